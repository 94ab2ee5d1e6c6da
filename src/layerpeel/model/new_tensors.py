"""New safetensors files, of tensors that are copied from other files, made from them, or in memory.

One is written after the other, and the kernel copies bytes that stay as they are, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerpeel.errors import RunError
from layerpeel.model.tensor_files import CHUNK, CODES, DTYPES, StoredTensor, stored_tensors

SHARD_SIZE = 5 * 10**9  # bytes of a file, beyond which the next one begins


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its description, and a way to its bytes.

    Attributes:
        stored: where its bytes are in another file, if they are copied from there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]
    stored: StoredTensor | None = None

    @classmethod
    def copied(cls, name: str, stored: StoredTensor) -> NewTensor:
        return cls(name, stored.dtype, stored.shape, stored.size, stored.chunks, stored)

    @classmethod
    def made(cls, name: str, like: StoredTensor, read: Callable[[], Tensor]) -> NewTensor:
        """One of the same shape and dtype as another, with the values that a call gives.

        Values that are the other's, as they were rounded when it was loaded, get its very bytes.
        """

        def chunks() -> Iterator[memoryview]:
            value, original = _on_cpu(read()), like.read()
            yield tensor_bytes(
                original if _same_bits(original.to(value.dtype), value) else value.to(DTYPES[like.dtype])
            )

        return cls(name, like.dtype, like.shape, like.size, chunks)

    @classmethod
    def of(cls, name: str, value: Tensor, dtype: torch.dtype | None = None) -> NewTensor:
        """One that is in memory, in its own dtype or another."""
        dtype = dtype or value.dtype

        def chunks() -> Iterator[memoryview]:
            yield tensor_bytes(_on_cpu(value).to(dtype))

        return cls(name, CODES[dtype], tuple(value.shape), value.numel() * dtype.itemsize, chunks)

    def write_to(self, file: FileIO, on_written: Callable[[int], object]) -> None:
        """Writes its bytes at the position of a file.

        Args:
            on_written: is told how many bytes have been written since the last call.
        """
        copied = _copy_in_kernel(self.stored, file, on_written) if self.stored else 0
        for chunk in self.stored.chunks(copied) if self.stored else self.chunks():
            _write_all(file, chunk)
            on_written(len(chunk))


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(
    folder: Path,
    tensors: Sequence[NewTensor],
    *,
    shard_size: int = SHARD_SIZE,
    on_written: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes `model.safetensors`, or several files and their index if there is more than `shard_size`.

    Args:
        on_written: is told how many bytes have been written since the last call.
    """
    shards = _split(tensors, shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        write_file(folder / name, shard, on_written)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _split(tensors: Sequence[NewTensor], shard_size: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def write_file(
    path: Path, tensors: Iterable[NewTensor], on_written: Callable[[int], object] = lambda size: None
) -> None:
    """Writes a safetensors file, a tensor at a time; `on_written` as in `write_tensors`."""
    # Tensors of wide numbers first, so that each begins at a multiple of its numbers' size; as safetensors does.
    ordered = sorted(tensors, key=lambda tensor: (-_itemsize(tensor), tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            tensor.write_to(file, on_written)


def _copy_in_kernel(stored: StoredTensor, file: FileIO, on_written: Callable[[int], object]) -> int:
    """Copies bytes to the position of a file without reading them; gives how many, for not every system can."""
    if not hasattr(os, "copy_file_range"):  # only Linux has it
        return 0
    copied = 0
    with stored.file.open("rb", buffering=0) as source:
        while copied < stored.size:
            count = min(CHUNK, stored.size - copied)
            try:
                count = os.copy_file_range(source.fileno(), file.fileno(), count, stored.start + copied)
            except OSError:  # also of what reading and writing will say better, such as a full disk
                break
            if not count:
                break
            copied += count
            on_written(count)
    return copied


def _write_all(file: FileIO, chunk: bytes | memoryview) -> None:
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) :]


def _itemsize(tensor: NewTensor) -> float:
    return tensor.size / max(math.prod(tensor.shape), 1)


def check_written(folder: Path, tensors: Iterable[NewTensor]) -> None:
    """Reads back what `write_tensors` wrote, and compares it byte by byte.

    Raises:
        RunError: it differs.
    """
    written = stored_tensors(folder)
    for tensor in tensors:
        stored = written.pop(tensor.name, None)
        if stored is None or not _is_as_meant(stored, tensor):
            raise RunError(
                f"{folder}: {tensor.name} is not in the file as it was written",
                hint="the disk or the memory of this machine may be at fault; run the same command again",
            )


def _is_as_meant(stored: StoredTensor, tensor: NewTensor) -> bool:
    if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        return False
    return all(one == other for one, other in zip(stored.chunks(), tensor.chunks(), strict=True))
