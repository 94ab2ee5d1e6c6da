"""Studies: a base config and what is varied of it, as runs that end in one table and one figure."""
