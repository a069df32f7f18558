"""Read named tensors from a path, without running anything in the file."""

# Files in the folder of a detector's run. The last one has the name of the last weights.
DETECTOR_BEST, DETECTOR_FINAL, DETECTOR_LAST = "model_best.pth", "model_final.pth", "last_checkpoint"
