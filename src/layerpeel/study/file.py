"""Reads a study's file (a base config, and the fields that vary) into the configs of its runs."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from layerpeel.config.fields import Folder, Section
from layerpeel.config.reading import describe, load_config, override, parse_config, read_file, resolve_paths
from layerpeel.config.run import RunConfig, StopConfig
from layerpeel.demo.preparing import prepare_demo
from layerpeel.errors import InputError
from layerpeel.importance.metrics import make_metric
from layerpeel.model.config_fields import text_config
from layerpeel.model.loading import load_teacher_config
from layerpeel.storage.outputs import check_output

OWN = {"seed": "give `seeds`", "output": "the study's `output` says where they are"}  # fields that a study sets


class StudyConfig(Section):
    """What is compared."""

    base: str | dict[str, Any] = "demo"
    """The config that all runs start from: a path, the config itself, or `demo`, that of the bundled teacher."""
    output: Folder
    """The study's folder; running again goes on with it."""
    set: dict[str, Any] = {}
    """Fields of the base, as `distill.learning_rate`, with other values."""
    remove: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """How many layers go, or which share of the teacher's, in place of the base's `stop`."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Fields, each with its values: every combination is a variant."""
    variants: dict[str, dict[str, Any]] = {}
    """Names, each with the fields that are other there. A variant may have a `base` of its own."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0]
    """Each variant runs once with each."""
    show: Literal["depths", "results", "sweep", "costs", "rankings", "layers"] = "depths"
    """The figure: quality by depth; the results; results against the grid's one field; against what they cost;
    agreement of rankings by different tasks; importance by relative depth."""

    @model_validator(mode="after")
    def _one_kind(self) -> StudyConfig:
        if self.grid and self.variants:
            raise ValueError("expected a grid or variants, found both")
        for values in (self.set, self.grid, *self.variants.values()):
            for field, instead in OWN.items():
                if field in values:
                    raise ValueError(f"{field}: every run of a study has its own; {instead}")
        if self.show == "sweep" and len(self.grid) != 1:
            raise ValueError("show: a sweep is over the one field of a grid")
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds: {twice[0]} is there twice, and would count one run as two")
        return self

    def named(self) -> dict[str, dict[str, Any]]:
        """The variants by name; the base alone, if nothing is varied."""
        if not self.grid:
            return self.variants or {"base": {}}
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return {", ".join(f"{_short(key)} {value}" for key, value in point.items()): point for point in points}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        variant: its name.
        values: the fields of the config that this variant sets.
        config: the run's config.
    """

    variant: str
    values: dict[str, Any]
    config: RunConfig


def load_study(path: Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, list[Job]]:
    """Reads a study.

    Args:
        path: a YAML file. Paths in it are taken from its folder first, then from the working folder.
        overrides: `field=value` of the study or of its base; `model=PATH` is the base's teacher.

    Raises:
        InputError: the file cannot be read, a field will not do, or nothing can be written in its output.
    """
    raw = read_file(path, "study", "studies")
    of_study = [text for text in overrides if _section(text) in StudyConfig.model_fields]
    of_base = [text for text in overrides if text not in of_study]
    for text in of_study:
        override(raw, text)
    try:
        study = StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error, StudyConfig)}", hint="see studies/ for examples") from None
    check_output(study.output, "")  # before the bundled teacher is written there
    of_base = [re.sub(r"^\s*model\s*=", "teacher=", text) for text in of_base]
    jobs = list(_jobs(study, path.parent, [*map(_assignment, study.set.items()), *of_base]))
    _check_figure(study, jobs[0].config)
    return study, jobs


def _check_figure(study: StudyConfig, first: RunConfig) -> None:
    """Checks that the first run, of which rankings are compared, will score its candidates by tasks."""
    if study.show == "rankings" and "tasks" not in make_metric(first.score.decide).needs:
        raise InputError(
            f"show: rankings by tasks are compared, and {first.score.decide} runs none",
            hint="set score.decide: task_quality",
        )


def _section(assignment: str) -> str:
    """The first part of the field that an override names."""
    return assignment.partition("=")[0].split(".")[0]


def _jobs(study: StudyConfig, folder: Path, overrides: list[str]) -> Iterator[Job]:
    folders: dict[str, str] = {}
    for name, values in study.named().items():
        slug = re.sub(r"[^\w.]+", "-", name).strip("-.")
        if not slug or slug in folders:
            raise InputError(
                f"variants: '{name}' would share its folder with '{folders.get(slug, '')}'",
                hint="give them names that differ in letters or digits",
            )
        folders[slug] = name
        values = dict(values)
        base = values.pop("base", study.base)
        config = _config(study, base, folder, [*overrides, *map(_assignment, values.items())], name)
        for seed in study.seeds:
            update = {"output": study.output / "runs" / slug / f"seed-{seed}", "seed": seed}
            yield Job(name, values, config.model_copy(update=update, deep=True))


def _config(
    study: StudyConfig, base: str | dict[str, Any], folder: Path, overrides: list[str], variant: str
) -> RunConfig:
    """A variant's config, without its seed and output."""
    overrides = ["output=unused", *(["stop={target_layers: 1}"] if study.remove else []), *overrides]
    if isinstance(base, dict):
        raw = copy.deepcopy(base)
        for text in overrides:
            override(raw, text)
        config = parse_config(raw, f"base of variant {variant}")
    elif base == "demo":
        config = load_config(prepare_demo(study.output / "demo"), overrides)
    else:
        config = load_config(folder / base if (folder / base).is_file() else base, overrides)
    config = resolve_paths(config, folder)
    if study.remove:
        config.stop = StopConfig(target_layers=_target(config, study.remove))
    return config


def _target(config: RunConfig, remove: int | float) -> int:
    """How many layers are left; at least one is removed."""
    teacher = load_teacher_config(config)
    total = int(text_config(teacher).num_hidden_layers)
    removed = remove if isinstance(remove, int) else max(1, round(remove * total))
    if removed >= total:
        raise InputError(
            f"remove: {removed} of the {total} layers of {config.teacher} would leave none", hint="remove fewer"
        )
    return total - removed


def _assignment(item: tuple[str, Any]) -> str:
    """A field and its value as `--set` takes them."""
    # YAML reads JSON's two escapes of a character beyond \uffff one by one, and folds the line breaks of Unicode.
    value = json.dumps(item[1], ensure_ascii=False)
    return f"{item[0]}=" + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in value)


def _short(field: str) -> str:
    """The last two parts of a field's name: `kl.weight` of `distill.losses.kl.weight`."""
    return ".".join(field.split(".")[-2:])
