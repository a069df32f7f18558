"""Pretraining: reconstruct masked patches, and evaluate the encoder during training."""
