"""How often a run reads layers from the disk where they stay there (`weights: stream`), and how long that takes here.

Counts what `model/streaming.py` reads for `inference/engine.py`, for `importance/`, and for the walks over layers of
`training/repair.py` and `training/forward.py`. Not counted are weights that earlier rounds changed: the student's are
read beside the teacher's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from layerpeel.errors import InputError
from layerpeel.importance.base import Metric
from layerpeel.inference.requests import Request, len_of
from layerpeel.model.streaming import read_tensors
from layerpeel.model.tensor_files import StoredTensor, stored_tensors
from layerpeel.plan.shape import Shape

PADDED = 1.2  # positions in rows for each token of a task: on the stories, rows are filled to 75 to 86 %
MOST_READ = 2**28  # bytes that are read for a time
DISK = 2e9  # bytes a second, of a disk that is not here


@dataclass(frozen=True)
class Reads:
    """How many layers the parts of a run read.

    Attributes:
        tokens: of the text that metrics read.
        requests: of each task.
    """

    shape: Shape
    tokens: int
    requests: Sequence[Sequence[Request]]

    def answering(self, metric: Metric, layers: int, candidates: Sequence[int], budget: int) -> int:
        """Of a metric: each batch goes through the student and, where it is text, through the teacher.

        Args:
            layers: of the student.
            candidates: positions that are skipped; none for an evaluation.
            budget: bytes that a batch may take on all branches.
        """
        reads = 0
        branches = 1 + len(candidates) if metric.skips else 1
        fit = max(1, self.shape.tokens_within(budget, branches))
        if "text" in metric.needs:
            passes, of_teacher = -(-self.tokens // fit), self.shape.layers if metric.skips else 0
            if metric.runs_besides:  # each candidate has a walk of its own, from the layer before it on
                reads += max(candidates) + layers + of_teacher
                reads += sum(layers - max(0, position - 1) for position in candidates)
            else:
                reads += passes * (layers + of_teacher)
        if "tasks" in metric.needs:
            tokens = (sum(map(len_of, task)) for task in self.requests)
            reads += layers * sum(math.ceil(PADDED * each / fit) for each in tokens)
        return reads

    def repair(self, start: int, removed: int) -> int:
        """Of a repair that begins at a position of the student: twice to repair a layer, once to go past it."""
        return self.shape.layers + 1 + (self.shape.layers - removed - start)

    def training(self, batches: float, graph: int, trained: int) -> float:
        """Of a training: each micro-batch goes through the teacher, and back through what does not train.

        Args:
            batches: micro-batches.
            graph: layers of the student that gradients go through.
            trained: layers of them that train, and are in memory.
        """
        return batches * (self.shape.layers + graph - trained)


def seconds_to_read(teacher: str, revision: str | None, dtype: torch.dtype) -> float:
    """Seconds for each parameter of a layer that is read from a checkpoint; of `DISK` where it is not here yet.

    A checkpoint that memory has room for is read from the disk once, and then from the system's cache, so that is
    timed; of a larger one the cache holds nothing when it is asked for again.
    """
    tensors = _stored(teacher, revision)
    if not tensors:
        return dtype.itemsize / DISK
    sample = _some(tensors)
    if sum(tensor.size for tensor in tensors.values()) < psutil.virtual_memory().available:
        _read(sample, dtype)
    else:
        _forget({tensor.file for tensor in sample.values()})
    started = time.perf_counter()
    parameters = _read(sample, dtype)
    return (time.perf_counter() - started) / max(1, parameters)


def _stored(teacher: str, revision: str | None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint; none if it is on the hub, and not all of it has been fetched yet.

    Raises:
        InputError: a folder has none, or a file is damaged.
    """
    if Path(teacher).is_dir():
        return stored_tensors(Path(teacher))
    config = try_to_load_from_cache(teacher, "config.json", revision=revision)
    try:
        return stored_tensors(Path(config).parent) if isinstance(config, str) else {}
    except InputError:
        return {}


def _some(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors to read for a time, from the middle of the checkpoint."""
    some: dict[str, StoredTensor] = {}
    names = [name for name, tensor in tensors.items() if len(tensor.shape) > 1]
    for name in names[len(names) // 2 :]:
        if some and sum(tensor.size for tensor in some.values()) + tensors[name].size > MOST_READ:
            break
        some[name] = tensors[name]
    return some


def _read(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    """Reads tensors as layers are read; gives how many numbers they hold."""
    files = {name: tensor.file for name, tensor in tensors.items()}
    read = read_tensors(files, torch.device("cpu"), dict.fromkeys(tensors, dtype))
    return sum(tensor.numel() for tensor in read.values())


def _forget(files: set[Path]) -> None:
    """Lets the system's cache drop files, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
