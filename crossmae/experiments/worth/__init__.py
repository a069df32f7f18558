"""The value of pretraining on one's own images: runs from several starts, at several numbers of labels."""
