"""Detector evaluation: average precision, pictures and the page of a run."""
