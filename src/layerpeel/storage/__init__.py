"""Files on disk: written whole, chained by checksums, and locked."""
