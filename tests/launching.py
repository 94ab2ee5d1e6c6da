"""Programs in several processes on this machine, as `torchrun` starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TIMEOUT = 240  # seconds
# Processes are forked from one that has imported what takes longer to import than most of these programs to run.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "transformers", "torch.distributed.fsdp", "accelerate", "datasets"])


def launch(*command: str, fsdp: bool = False, dies: bool = False, processes: int = 2) -> str:
    """Runs a module (`-m NAME …`) in several processes; gives what they said on stderr.

    Args:
        command: what Python is given.
        fsdp: whether weights are split over the processes.
        dies: whether it has to fail; where one does, the others are ended, as torch's own launcher does it.
        processes: how many.
    """
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_FSDP": str(fsdp).lower(),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(fsdp).lower(),  # as `accelerate launch --use_fsdp` sets it
    }
    with tempfile.TemporaryDirectory() as folder:
        codes, said = _forked(command[1:], environment, processes, Path(folder))
    assert any(codes) == dies, f"{codes}\n{said[-9000:]}"
    return said


def _forked(
    command: tuple[str, ...], environment: dict[str, str], processes: int, folder: Path
) -> tuple[list[int | None], str]:
    """The exit codes, and what was said on stderr."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this one, which outlives them all
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    said = [folder / str(rank) for rank in range(processes)]
    started = []
    for rank, file in enumerate(said):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(_SERVER.Process(target=_run, args=(command, environment | ranks, file)))
        started[-1].start()
    end = time.monotonic() + TIMEOUT
    try:
        while any(each.is_alive() for each in started) and not any(each.exitcode for each in started):
            assert time.monotonic() < end, "\n".join(file.read_text(encoding="utf-8") for file in said)
            time.sleep(0.02)
        for each in started:
            each.join(1)  # those that end by themselves, in a moment
    finally:
        for each in started:
            each.terminate()
            each.join(10)
            each.kill()
            each.join()
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in said if file.exists())
    return [each.exitcode for each in started], text


def _run(command: tuple[str, ...], environment: dict[str, str], said: Path) -> None:
    """In a forked process: the module, as `python -m` runs it."""
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(os.open(os.devnull if number == 1 else said, os.O_WRONLY | os.O_CREAT), number)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
