"""The tensors of a checkpoint as they lie in its safetensors files: their headers and their bytes.

Nothing is mapped or kept: what is read goes through a small buffer, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layerpeel.errors import InputError, RunError, reason_of

CHUNK = 8 * 2**20  # bytes that are copied at a time
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


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name: those that transformers reads, and not what lies beside them.

    Raises:
        InputError: there are no safetensors, or a file is damaged or absent.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= tensors_in(file)
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


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: it is absent, damaged, or no such file.
    """
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
