"""Students as people take them away: checkpoints in a folder or on the hub."""
