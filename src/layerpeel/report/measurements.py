"""Measurements of a run's students (speed, memory, sampled text), and the file in the run's folder that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from layerpeel.run.events import Machine
from layerpeel.storage.files import write_whole


@dataclass(frozen=True)
class DepthSpeed:
    """Speed and memory of one student.

    Attributes:
        ms_per_token: milliseconds a generated token at batch 1, median over the repeats.
        ms_per_token_least, ms_per_token_most: the fastest and the slowest repeat.
        tokens_per_second: generated tokens a second at batch `MeasureSetup.batch`, median over the repeats.
        peak_memory: bytes at batch 1: weights, KV cache and activations.
    """

    ms_per_token: float
    ms_per_token_least: float
    ms_per_token_most: float
    tokens_per_second: float
    peak_memory: int


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt.

    Attributes:
        source: the task that the prompt is from, or `text`.
        prompt: its text.
        texts: the continuation by the student of each round; that of round 0 is the teacher's.
    """

    source: str
    prompt: str
    texts: dict[int, str]


@dataclass(frozen=True)
class MeasureSetup:
    """How speed was measured.

    Attributes:
        prompt_tokens: length of the prompt.
        new_tokens: number of tokens generated.
        batch: rows of the batched generation.
        repeats: how often each student was measured.
        device: as torch writes it.
        dtype: of the weights, without `torch.`.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Measurements:
    """What was measured of all students of a run.

    Attributes:
        setup: how.
        machine: where.
        depths: speed and memory by round; round 0 is the teacher.
        samples: text that the students generated.
    """

    setup: MeasureSetup
    machine: Machine
    depths: dict[int, DepthSpeed]
    samples: list[Sample]


@dataclass(frozen=True)
class NotMeasured:
    """The students could not be rebuilt from the run.

    Attributes:
        problem: the error's message.
    """

    problem: str


_FILE = TypeAdapter(Measurements)


def measurements_path(run_folder: Path) -> Path:
    return run_folder / "report" / "measurements.json"


def read_measurements(path: Path) -> Measurements | None:
    """The measurements in a file; None if there is no such file, or it is damaged."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_measurements(path: Path, measurements: Measurements) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(_FILE.dump_python(measurements, mode="json"), ensure_ascii=False, indent=1))
