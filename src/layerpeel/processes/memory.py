"""Errors that say that memory is full."""

from __future__ import annotations

import re

# What CUDA's libraries and its pinned memory say, which Accelerate does not know: a handle of cuBLAS made when the GPU
# is full, a workspace of cuSOLVER, host memory that cannot be pinned.
OF_CUDA = re.compile("ALLOC_FAILED|CUDA error: out of memory")

LESS_MEMORY = "lower distill.batch_size, distill.sequence_length or score.memory"


def memory_is_full(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the host's, does not suffice."""
    from accelerate.utils.memory import should_reduce_batch_size  # seconds to import

    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return should_reduce_batch_size(error) or bool(OF_CUDA.search(str(error)))
