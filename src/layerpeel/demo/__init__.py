"""The bundled teacher and the small world that it was trained on, ready to run."""
