"""A run's config: its sections and fields, and reading it from YAML."""

from __future__ import annotations

from layerpeel.config.distill import DistillConfig, LastPassConfig, LossConfig, RepairConfig
from layerpeel.config.fields import Section, TeacherTextConfig, TextConfig, TextSource
from layerpeel.config.reading import (
    describe,
    load_config,
    override,
    parse_config,
    read_file,
    resolve_paths,
    sections_in,
)
from layerpeel.config.run import RunConfig, StopConfig, TaskConfig
from layerpeel.config.score import HealConfig, ProtectConfig, RaceConfig, ScoreConfig, ShortlistConfig

__all__ = [
    "DistillConfig",
    "HealConfig",
    "LastPassConfig",
    "LossConfig",
    "ProtectConfig",
    "RaceConfig",
    "RepairConfig",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "ShortlistConfig",
    "StopConfig",
    "TaskConfig",
    "TeacherTextConfig",
    "TextConfig",
    "TextSource",
    "describe",
    "load_config",
    "override",
    "parse_config",
    "read_file",
    "resolve_paths",
    "sections_in",
]
