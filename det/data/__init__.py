"""Detection data: COCO files, their checks, augmentation and batches."""
