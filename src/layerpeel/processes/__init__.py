"""This process: which of several it is, what a person sees of it, and how it is stopped."""
