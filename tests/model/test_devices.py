"""Which device a process takes, and what is said of one that it cannot have."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from layerpeel.errors import InputError
from layerpeel.model import devices
from layerpeel.model.devices import pick_device, wanted_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets how many GPUs there are, how many processes, and which of those of this machine this one is."""

    def build(gpus: int, world: int = 1, local: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(devices, "WORLD_SIZE", world)
        monkeypatch.setattr(devices, "LOCAL_RANK", local)

    return build


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("gpus", "world", "local", "index"),
    [(1, 1, 0, 0), (8, 1, 0, 0), (8, 8, 3, 3), (8, 16, 7, 7), (1, 8, 3, 0)],  # the last: SLURM shows each its own
)
def test_each_process_has_a_gpu_of_its_own(machine, name: str, gpus: int, world: int, local: int, index: int) -> None:
    machine(gpus, world, local)
    assert pick_device(name) == torch.device("cuda", index)


def test_without_a_gpu_it_is_the_cpu(machine) -> None:
    machine(0)
    assert pick_device("auto").type in ("cpu", "mps")
    with pytest.raises(InputError, match="device: there is no cuda here"):
        pick_device("cuda")


def test_one_process_may_name_a_gpu(machine) -> None:
    machine(2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="device: there is no cuda:2 here"):
        pick_device("cuda:2")


def test_several_processes_may_not_name_the_same_gpu(machine) -> None:
    machine(4, 4, 2)
    with pytest.raises(InputError) as caught:
        pick_device("cuda:1")
    assert str(caught.value) == ("device: cuda:1 would be that of all 4 processes, and each needs a GPU of its own")
    assert caught.value.hint == "use device: cuda or auto; which GPUs are taken, CUDA_VISIBLE_DEVICES says"


def test_more_processes_than_gpus_are_refused(machine) -> None:
    machine(2, 4, 3)
    with pytest.raises(InputError) as caught:
        pick_device("auto")
    assert str(caught.value) == (
        "device: process 3 of this machine has no GPU: 2 are visible, and each process needs one of its own"
    )
    assert caught.value.hint == "start 2 processes on this machine (--nproc-per-node 2), or fewer"


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(InputError, match="dtype: unknown 'bfloat'; did you mean 'bfloat16'"):
        wanted_dtype(LlamaConfig(), torch.device("cpu"), "bfloat")
    assert wanted_dtype(LlamaConfig(), torch.device("cpu"), "auto") == torch.float32
