"""Data for every kind of training: find, decode and order images."""
