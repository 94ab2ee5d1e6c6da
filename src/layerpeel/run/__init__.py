"""A run: its record, its folder, its checks, and the paper's loop."""
