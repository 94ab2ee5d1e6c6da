"""Scripts that run in other Pythons, beside other runtimes; they import nothing of this package."""
