"""Conversion: write the layout of another library and prove that it computes the same."""
