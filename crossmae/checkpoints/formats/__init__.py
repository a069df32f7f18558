"""Formats: names and configs of other libraries' weight files."""
