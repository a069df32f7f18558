"""The study of this repository: arms, cells, predictions and page."""
