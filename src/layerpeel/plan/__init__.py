"""What a run will take, from configs alone."""
