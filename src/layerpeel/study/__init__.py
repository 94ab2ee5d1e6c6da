"""Studies: a base config and the fields that vary, as runs that end in a table and a figure."""
