"""Who writes what to disk, and how nothing of it is lost."""
