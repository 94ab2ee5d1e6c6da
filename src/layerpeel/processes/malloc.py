"""What glibc's malloc keeps of the memory that a process frees, on a CPU; other systems' are left as they are."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of `mallopt`, as in malloc.h
LARGE = 2**20  # bytes of a block that the system gives and takes back by itself
# What glibc comes to by itself, once large blocks have been freed: pages that are used again need not be cleared.
USUAL = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
_afterwards = dict(USUAL)  # what is set when `large_blocks_given_back` ends


@cache
def _glibc() -> Any:
    """The C library; None if it is another one."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def release_unused() -> None:
    """Collects what nothing refers to any more, and gives what is free back to the system."""
    gc.collect()
    if library := _glibc():
        library.malloc_trim(0)


def give_back_large_blocks() -> None:
    """As `large_blocks_given_back`, for as long as the process runs."""
    _afterwards.clear()
    if library := _glibc():
        library.mallopt(MMAP_THRESHOLD, LARGE)


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """While the context lasts, a large tensor on the CPU takes memory no longer than it lives.

    Otherwise glibc keeps what is freed, and before version 2.38 seldom finds room in it for an aligned block of the
    same size. Layers that are gathered and freed in turn then leave gaps that take as much memory as the model. The
    price is that the system clears the pages of each block.
    """
    library = _glibc()
    if library:
        library.mallopt(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        for option, value in _afterwards.items() if library else ():
            library.mallopt(option, value)
