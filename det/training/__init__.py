"""Detector training: the loop, its optimizer and its checkpoints."""
