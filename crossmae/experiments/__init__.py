"""Experiments: grids of runs that answer a question, with their costs, statistics and pages."""
