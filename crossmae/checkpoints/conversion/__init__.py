"""Conversion: write the layout of another library, and check that the written encoder gives the same tokens."""
