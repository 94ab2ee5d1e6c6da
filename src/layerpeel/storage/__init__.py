"""Files on disk: written whole, chained by checksums, locked, checked beforehand; and the hub."""
