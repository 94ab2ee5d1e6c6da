"""A run's config: its sections and fields, and reading it from YAML."""

from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig

__all__ = ["RunConfig", "load_config"]
