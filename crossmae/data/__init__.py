"""Data: find, decode and order images, for every kind of training."""
