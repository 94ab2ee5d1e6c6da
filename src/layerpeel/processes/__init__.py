"""This process: its rank among the launched ones, what it shows on stderr, and how signals stop it."""
