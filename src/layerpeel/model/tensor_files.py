"""The tensors of a checkpoint as they lie in its safetensors files: their headers, their bytes, and new files of them.

Nothing is mapped or kept: the kernel copies bytes that stay as they are, and what is read goes through a small buffer,
whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerpeel.errors import InputError, RunError, reason_of

CHUNK = 8 * 2**20  # bytes that are copied at a time
SHARD_SIZE = 5 * 10**9  # bytes of a file, beyond which the next one begins
LARGEST_HEADER = 100_000_000  # bytes, of the format
# Floating-point dtypes, as the format calls them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in FLOATS.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor are.

    Attributes:
        start: offset of the first byte in `file`.
        size: bytes.
        dtype: as the format calls it, such as `BF16`.
    """

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    def chunks(self, skipped: int = 0) -> Iterator[bytes]:
        """The bytes, a few at a time, without so many at the beginning."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + skipped)
            left = self.size - skipped
            while left:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    raise RunError(f"{self.file}: the file has become shorter", hint="fetch it again")
                left -= len(chunk)
                yield chunk

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            KeyError: its dtype is one that is only copied.
        """
        dtype = DTYPES[self.dtype]
        if not self.size:
            return torch.empty(self.shape, dtype=dtype)
        content = bytearray(self.size)
        end = 0
        for chunk in self.chunks():
            content[end : end + len(chunk)] = chunk
            end += len(chunk)
        return torch.frombuffer(content, dtype=dtype).view(self.shape)


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
        """One of the same shape and dtype as another, with the values that a call gives."""

        def chunks() -> Iterator[memoryview]:
            yield tensor_bytes(read().to(DTYPES[like.dtype]))

        return cls(name, like.dtype, like.shape, like.size, chunks)

    def write_to(self, file: FileIO, on_written: Callable[[int], object]) -> None:
        """Writes its bytes at the position of a file.

        Args:
            on_written: is told how many bytes have been written since the last call.
        """
        copied = _copy_in_kernel(self.stored, file, on_written) if self.stored else 0
        for chunk in self.stored.chunks(copied) if self.stored else self.chunks():
            _write_all(file, chunk)
            on_written(len(chunk))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name: those that transformers reads, and not what lies beside them.

    Raises:
        InputError: there are no safetensors, or a file is damaged or absent.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= _read_header(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `model.safetensors`, or those that its index names.

    Raises:
        InputError: there are none.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    raise InputError(
        f"{folder}: there is no model.safetensors, nor an index of several files",
        hint="convert other formats with save_pretrained",
    )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError("the header is too long")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                file,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
                entry["dtype"],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"{file}: no safetensors file, or not whole ({reason_of(error)})", hint="fetch it again"
        ) from None


def main_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The floating-point dtype that most bytes of a checkpoint are stored in; None if there is none."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size
    names = [name for name, _ in sizes.most_common() if name in FLOATS]
    return FLOATS[names[0]] if names else None


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
        _write_file(folder / name, shard, on_written)
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


def _write_file(path: Path, tensors: Iterable[NewTensor], on_written: Callable[[int], object]) -> None:
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
