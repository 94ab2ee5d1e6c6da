"""Writes students as checkpoints, to a folder or to the Hugging Face hub."""
