"""Compares a student, as transformers runs it here, with what another runtime makes of it."""
