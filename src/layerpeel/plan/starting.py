"""From a model to a first config that runs as it stands, sized for this machine: what `layerpeel init` does."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.inference.loading import load_layerwise
from layerpeel.model.checkpoint import least_parameters
from layerpeel.model.config_fields import context_length, text_config
from layerpeel.model.devices import pick_device
from layerpeel.model.loading import load_config_of
from layerpeel.plan.choices import Choices
from layerpeel.plan.fitting import BY_TASKS, BY_TEXT, OR_STREAM, REMEDY, Fitter, fit_memory, fit_time
from layerpeel.plan.machine import Planner
from layerpeel.plan.memory import resident_bytes
from layerpeel.plan.planning import Plan
from layerpeel.plan.quality import (
    MOST_ROWS,
    Measure,
    harness_measures,
    held_out_fields,
    held_out_texts,
    hold_out_every,
    measure_to_be_written,
    sampled_texts,
    text_measure,
    write_texts,
)
from layerpeel.processes.progress import console, shown
from layerpeel.processes.text import one_line, size
from layerpeel.run.preflight import check_teacher
from layerpeel.storage.files import write_whole

KEPT_DEPTH = 0.8  # of the teacher's, where no target is given
LENGTHS = {"cpu": 256}  # of rows; else:
LENGTH_ON_GPU = 1024
FIRST_TOKENS = {"cpu": 10_000}  # of a round, in the first plan; else:
FIRST_TOKENS_ON_GPU = 5_000_000


@dataclass(frozen=True)
class Wishes:
    """What a user says of a first config.

    Attributes:
        model: a folder or a hub name.
        file: where the config goes.
        target_layers: the depth to reach; four fifths of the teacher's if None.
        text: a path or a hub name; the teacher's own if None.
        minutes: that the run may take.
        memory: bytes that it may take; what is free if None.
        harness: whether to ask for tasks of lm-evaluation-harness.
    """

    model: str
    file: Path
    target_layers: int | None = None
    text: str | None = None
    minutes: float = 60.0
    memory: int | None = None
    harness: bool = True

    @property
    def held_out(self) -> Path:
        """Where text goes that is held out."""
        return self.file.with_name(f"{self.file.stem}-held-out.jsonl")


@dataclass(frozen=True)
class Started:
    """A first config that was written.

    Attributes:
        files: that were written, the config first.
    """

    choices: Choices
    plan: Plan
    files: list[Path]


def start(wishes: Wishes) -> Started:
    """Writes a first config, and the text that it holds out.

    Raises:
        InputError: the model will not do, does not fit into the memory, or not into the time; there is no text; or a
            file is there already.
    """
    _check_files(wishes)
    teacher = load_config_of(wishes.model)
    limit = wishes.memory or free_memory()
    if not wishes.text:  # else layers may stay on the disk
        _check_size(wishes.model, teacher, limit)
    choices = _first_choices(wishes, teacher)
    settings = choices.config()
    check_teacher(settings)
    planner = Planner(settings)
    choices, planned = fit_memory(choices, Fitter(planner), limit)
    if choices.stream:
        _check_streams(wishes.model, choices.config())
    quality = _quality(choices, wishes, planner, planned.shape.parameters)
    choices, planned = fit_time(quality.asked_of(choices), Fitter(planner, quality.measures), 60 * wishes.minutes)
    return Started(choices, planned, _write(choices, wishes, quality, planned))


def free_memory() -> float:
    """Bytes that a run may take here: those free on the GPU, or of the machine, without what this process has."""
    device = pick_device()
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available + resident_bytes()


def _check_files(wishes: Wishes) -> None:
    """Checks that the files can be written and are not there.

    Raises:
        InputError: they cannot, or are.
    """
    for file in (wishes.file, wishes.held_out):
        if file.exists() or file.is_symlink():
            raise InputError(f"--output: {file} is there already", hint="name another file, or move it away")
    folder = wishes.file.parent
    if not folder.is_dir():
        raise InputError(f"--output: there is no folder {folder}", hint="make it, or name a file in another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--output: you may not write in {folder.absolute()}", hint="name a file in another folder")


def _check_size(model: str, teacher: PretrainedConfig, limit: float) -> None:
    """Refuses a model whose weights alone surely do not fit, before its shape is built.

    Raises:
        InputError: they do not.
    """
    least = 2 * least_parameters(teacher)
    if least > limit:
        raise InputError(
            f"{model}: its weights alone take {size(least)} of memory or more, and there are {size(limit)}",
            hint=REMEDY + OR_STREAM,
        )


def _check_streams(model: str, config: RunConfig) -> None:
    """Reads what a run reads at first whose layers stay on the disk.

    Raises:
        InputError: they cannot.
    """
    try:
        load_layerwise(config, stream=True)
    except InputError as error:
        raise InputError(
            f"{model}: it does not fit into memory, and its layers cannot be read from disk as they run: {error}",
            hint=REMEDY,
        ) from None


def _first_choices(wishes: Wishes, teacher: PretrainedConfig) -> Choices:
    """What is chosen before anything is planned."""
    device = pick_device().type
    layers = text_config(teacher).num_hidden_layers
    longest = context_length(teacher)
    layers = layers if isinstance(layers, int) else 1  # refused by `check_teacher`
    length = LENGTHS.get(device, LENGTH_ON_GPU)
    length = min(length, longest or length)
    return Choices(
        teacher=_from_config(wishes.model, wishes),
        output=f"runs/{wishes.file.stem}",
        layers=layers,
        target_layers=wishes.target_layers or max(1, min(layers - 1, round(KEPT_DEPTH * layers))),
        scoring=BY_TEXT[0],
        tokens_per_round=FIRST_TOKENS.get(device, FIRST_TOKENS_ON_GPU),
        sequence_length=length,
        text=_from_config(wishes.text, wishes) if wishes.text else None,
        hold_out=hold_out_every(wishes.text) if wishes.text else None,
        tasks=(held_out_fields(wishes.held_out.name, length),),
        limit=MOST_ROWS,
    )


@dataclass(frozen=True)
class _Quality:
    """What quality is measured on.

    Attributes:
        texts: that are held out of the user's text; None where the teacher has yet to write them.
    """

    measures: list[Measure]
    texts: list[str] | None

    def asked_of(self, choices: Choices) -> Choices:
        """The choices with these tasks, which rank the layers if there are others than held-out text."""
        asks = any(measure.fields["kind"] != "perplexity" for measure in self.measures)
        return replace(
            choices,
            tasks=tuple(measure.fields for measure in self.measures),
            limit=max(len(measure.requests) for measure in self.measures),
            scoring=BY_TASKS[0] if asks else choices.scoring,
        )


def _quality(choices: Choices, wishes: Wishes, planner: Planner, parameters: int) -> _Quality:
    """Tasks of the harness, where they can be had, and held-out text of the user's; with neither, the teacher's."""
    measures: list[Measure] = []
    if wishes.harness:
        console.print("looking for tasks of lm-evaluation-harness", style="dim")
        measures, missing = harness_measures(parameters, planner.tokenizer)
        if missing:
            instead = "fewer tasks are asked" if measures else "quality is measured on text"
            console.print(shown(f"note: {missing}; {instead}"), soft_wrap=True)
    (fields,) = choices.tasks
    if wishes.text:
        texts = held_out_texts(TextConfig(path=wishes.text, hold_out=choices.hold_out), planner.tokenizer)
        return _Quality([*measures, text_measure(fields, texts, planner.tokenizer)], texts)
    if measures:
        return _Quality(measures, [])
    return _Quality([measure_to_be_written(fields, choices.sequence_length)], None)


def _write(choices: Choices, wishes: Wishes, quality: _Quality, planned: Plan) -> list[Path]:
    """Writes held-out text, if there is some, and the config; gives the files, the config first."""
    texts = sampled_texts(choices.config(), choices.limit) if quality.texts is None else quality.texts
    if texts:
        write_texts(wishes.held_out, texts)
    name, minutes = one_line(Path(wishes.model).name), sum(planned.seconds.values()) / 60
    heading = (
        f"{name}, {choices.layers} layers to {choices.target_layers}, sized by `layerpeel init` for "
        f"about {minutes:.0f} min here: layerpeel run {one_line(wishes.file.name)}"
    )
    write_whole(wishes.file, choices.text_of_config(heading))
    return [wishes.file, *([wishes.held_out] if texts else [])]


def _from_config(path: str, wishes: Wishes) -> str:
    """A path as the config says it: as it was given, if that leads there from the config's folder, too."""
    path = os.path.expanduser(path)
    beside = wishes.file.parent.resolve() == Path.cwd()
    return path if beside or not os.path.exists(path) else os.path.abspath(path)
