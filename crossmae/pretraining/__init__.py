"""Pretraining: reconstruct masked patches, and judge the encoder while it learns."""
