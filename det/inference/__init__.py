"""Detector inference: predictions for images and videos, drawing and export."""
