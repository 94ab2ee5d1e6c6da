"""Tests of bytes that are copied from file to file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerpeel.model.new_tensors import NewTensor, check_written, write_tensors
from layerpeel.model.tensor_files import stored_tensors

BLOCK = 2**20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with tensors of several dtypes and sizes, one larger than what is copied at a time, one empty."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {
        "large": torch.randn(5 * BLOCK // 4 + 3, 2).bfloat16(),
        "bias": torch.randn(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copied(source: Path, folder: Path) -> int:
    """Copies all tensors under new names; gives how many bytes were announced."""
    folder.mkdir()
    tensors = [NewTensor.copied(f"new.{name}", stored) for name, stored in stored_tensors(source).items()]
    announced: list[int] = []
    write_tensors(folder, tensors, on_written=announced.append)
    check_written(folder, tensors)
    return sum(announced)


def is_copy(folder: Path, source: Path) -> bool:
    before, after = (load_file(each / "model.safetensors") for each in (source, folder))
    return after.keys() == {f"new.{name}" for name in before} and all(
        torch.equal(after[f"new.{name}"], tensor) and after[f"new.{name}"].dtype == tensor.dtype
        for name, tensor in before.items()
    )


def size_of(source: Path) -> int:
    return sum(stored.size for stored in stored_tensors(source).values())


def test_bytes_are_copied_and_counted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensor_files", "new_tensors"):
        monkeypatch.setattr(f"layerpeel.model.{module}.CHUNK", BLOCK)
    assert copied(source, tmp_path / "copy") == size_of(source)
    assert is_copy(tmp_path / "copy", source)


@pytest.mark.parametrize("calls", [0, 1], ids=["from the first byte on", "after some"])
@pytest.mark.parametrize("failure", [errno.EXDEV, errno.EOPNOTSUPP, None], ids=["disks", "unsupported", "nothing done"])
def test_where_the_kernel_does_not_copy_bytes_are_read_and_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, failure: int | None
) -> None:
    done = 0

    def copy_file_range(from_: int, to: int, count: int, start: int) -> int:
        nonlocal done
        done += 1
        if done > calls:
            if failure:
                raise OSError(failure, os.strerror(failure))
            return 0
        return os.write(to, os.pread(from_, count // 2, start))

    monkeypatch.setattr(os, "copy_file_range", copy_file_range, raising=False)
    assert copied(source, tmp_path / "copy") == size_of(source)
    assert done > calls
    assert is_copy(tmp_path / "copy", source)


def test_systems_without_such_a_call_copy_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert copied(source, tmp_path / "copy") == size_of(source)
    assert is_copy(tmp_path / "copy", source)
