"""Experiments: grids of runs, their statistics and their pages."""
