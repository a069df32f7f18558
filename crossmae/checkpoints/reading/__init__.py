"""Reading: from a path to named tensors, without running anything that is in a file."""
