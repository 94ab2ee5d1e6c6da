"""What malloc keeps of freed memory, against what the process has resident."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import psutil
import pytest
import torch

from layerpeel.processes.malloc import large_blocks_given_back, release_unused

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")
MIB = 2**20


@pytest.fixture
def kept() -> Iterator[None]:
    """Malloc as it is once large blocks have been freed: it keeps those of up to 32 MiB."""
    with large_blocks_given_back():
        pass
    yield
    release_unused()


def resident() -> float:
    """MiB."""
    return float(psutil.Process().memory_info().rss) / MIB


def freed_below_another() -> float:
    """MiB that stay resident of 16 blocks of 8 MiB that are freed while a later one lives."""
    before = resident()
    blocks = [torch.ones(8 * MIB, dtype=torch.uint8) for _ in range(17)]
    assert resident() - before > 100
    del blocks[:-1]
    return resident() - before - 8


@linux
def test_malloc_keeps_what_is_freed_until_it_is_told_not_to(kept: None) -> None:
    assert freed_below_another() > 100
    release_unused()
    with large_blocks_given_back():
        assert freed_below_another() < 20
    release_unused()
    assert freed_below_another() > 100


@linux
def test_what_is_unused_is_released(kept: None) -> None:
    before = resident()
    blocks = [torch.ones(8 * MIB, dtype=torch.uint8) for _ in range(17)]
    last = blocks.pop()
    del blocks
    release_unused()
    assert len(last) and resident() - before < 28


def test_what_refers_to_itself_is_collected() -> None:
    class Circle:
        pass

    gc.disable()
    try:
        circle = Circle()
        circle.itself = circle  # type: ignore[attr-defined]
        there = weakref.ref(circle)
        del circle
        assert there()
        release_unused()
        assert not there()
    finally:
        gc.enable()
