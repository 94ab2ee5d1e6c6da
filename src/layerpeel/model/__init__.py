"""Causal language models: finding, removing and recording layers; loading and saving checkpoints."""
