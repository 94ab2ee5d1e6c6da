"""Tensors in a file of each process, with its parts of what is split; any number of processes reads them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.files import whole_file
from layerpeel.training.split_tensors import part_of


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in open files, of which it is read when it is asked for.

    Attributes:
        name: in the files.
        shape: of all parts together.
        dim: which dimension is split.
        parts: the files that hold a part of it, and where in that dimension each begins.
    """

    name: str
    shape: torch.Size
    dim: int
    parts: Sequence[tuple[Any, int]]

    def full(self) -> Tensor:
        """A copy of all of it, on the CPU."""
        values = [file.get_tensor(self.name) for file, _ in self.parts]
        return torch.cat(values, self.dim) if len(values) > 1 else values[0].clone()

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """A copy of a part of it, as `Tensor.narrow` has it, on the CPU."""
        assert dim == self.dim or len(self.parts) == 1
        pieces = []
        for file, first in self.parts:
            part = file.get_tensor(self.name)
            begin, end = (min(max(place - first, 0), part.shape[dim]) for place in (start, start + length))
            pieces.append(part.narrow(dim, begin, end - begin))
        return torch.cat(pieces, dim)


def write_parts(path: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Writes what this process holds of tensors that are split, and of the others all, in the first process.

    Returns once it is on the disk. All processes have to call this where tensors are split.

    Args:
        text: kept with them.
    """
    held: dict[str, Tensor] = {}
    split: dict[str, Any] = {}
    for name, value in tensors.items():
        placement = value.placements[0] if isinstance(value, DTensor) else None
        if isinstance(value, DTensor) and isinstance(placement, Shard):
            held[name] = _on_cpu(value.to_local())
            start, length = part_of(value.shape[placement.dim], value.device_mesh)
            assert held[name].shape[placement.dim] == length
            split[name] = {"shape": list(value.shape), "dim": placement.dim, "start": start}
            continue
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main_process():
            held[name] = _on_cpu(full)
    header = {"text": text, "split": json.dumps(split)}
    with whole_file(path) as partial:
        save_file(held, partial, header | {"sha256": _digest(held, header)})


def is_undamaged(path: Path) -> bool:
    """Whether a file is as `write_parts` left it."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    return bool(header.pop("sha256", None) == _digest(held, header))


def open_parts(paths: Sequence[Path]) -> tuple[dict[str, SavedTensor], str]:
    """The tensors that each process wrote a file of, in the order of their ranks, and the text of the first."""
    files = [safe_open(path, framework="pt") for path in paths]
    tensors: dict[str, SavedTensor] = {}
    for file in files:
        split = json.loads(file.metadata()["split"])
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            place = split.get(name, {"shape": shape, "dim": 0, "start": 0})
            before = tensors[name].parts if name in tensors else ()
            parts = [*before, (file, place["start"])]
            tensors[name] = SavedTensor(name, torch.Size(place["shape"]), place["dim"], parts)
    return tensors, files[0].metadata()["text"]


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
