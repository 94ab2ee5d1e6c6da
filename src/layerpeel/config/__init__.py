"""A run's config: what it holds, and how it is read."""

from layerpeel.config.reading import (
    describe,
    load_config,
    override,
    parse_config,
    read_file,
    resolve_paths,
    sections_in,
)
from layerpeel.config.sections import (
    DistillConfig,
    HealConfig,
    LastPassConfig,
    LossConfig,
    ProtectConfig,
    RaceConfig,
    RunConfig,
    ScoreConfig,
    Section,
    ShortlistConfig,
    StopConfig,
    TaskConfig,
    TextConfig,
)

__all__ = [
    "DistillConfig",
    "HealConfig",
    "LastPassConfig",
    "LossConfig",
    "ProtectConfig",
    "RaceConfig",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "ShortlistConfig",
    "StopConfig",
    "TaskConfig",
    "TextConfig",
    "describe",
    "load_config",
    "override",
    "parse_config",
    "read_file",
    "resolve_paths",
    "sections_in",
]
