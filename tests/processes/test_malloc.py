"""What malloc keeps of freed memory, against what the process has resident."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from layerpeel.processes.malloc import release_unused

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")

# MiB that stay resident of 16 blocks of 8 MiB that are freed while a later one lives: where malloc is told to give them
# back; where it keeps them; and of those when what is unused has been released.
PROGRAM = """
import psutil, torch
from layerpeel.processes.malloc import give_back_large_blocks, large_blocks_given_back, release_unused

def resident():
    return psutil.Process().memory_info().rss / 2**20

def freed_below_another():
    release_unused()
    before = resident()
    blocks = [torch.ones(2**23, dtype=torch.uint8) for _ in range(17)]
    assert resident() - before > 100
    del blocks[:-1]
    kept = resident() - before - 8
    release_unused()
    print(kept, resident() - before - 8)

with large_blocks_given_back():
    freed_below_another()
freed_below_another()
"""


@linux
def test_malloc_keeps_what_is_freed_unless_it_is_told_not_to() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given_back, after_that, kept, released = map(float, done.stdout.split())
    assert max(given_back, after_that, released) < 20 and kept > 100


@linux
def test_what_is_given_back_for_good_is_so_after_a_context() -> None:
    program = PROGRAM.replace("\nwith ", "\ngive_back_large_blocks()\nwith ")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) < 20


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
