"""What says that memory is full, in the words of each library, and what does not."""

from __future__ import annotations

import pytest
import torch

from layerpeel.processes.memory import memory_is_full


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_full_memory_is_told(error: Exception) -> None:
    assert memory_is_full(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError("out of memory."),
    ],
)
def test_other_errors_are_not_of_memory(error: Exception) -> None:
    assert not memory_is_full(error)


def test_a_real_allocation_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert memory_is_full(failed.value)
