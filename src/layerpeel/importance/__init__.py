"""Layer importance, one metric a file."""
