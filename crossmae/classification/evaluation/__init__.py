"""Classification evaluation: metrics, tables and pictures of a classifier's predictions."""
