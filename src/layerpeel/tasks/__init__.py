"""Measurements of quality, one kind a file."""
