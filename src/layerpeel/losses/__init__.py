"""The losses a student is trained by, one a file."""
