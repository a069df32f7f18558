"""Read named tensors from a path, without running anything in the file."""
