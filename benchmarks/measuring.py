"""Measurements in processes of their own, and the files that they are kept in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from layerpeel.processes.distributed import RANK

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT.parent / "shared" / "kit"  # models, text and tasks, beside the repository


def command_given() -> str:
    """The command that this process was started by, without where it writes to."""
    arguments = [*sys.argv]
    if "--out" in arguments:
        place = arguments.index("--out")
        del arguments[place : place + 2]
    return f"python benchmarks/{Path(arguments[0]).name} {' '.join(arguments[1:])}".strip()


def measured_apart(script: str, *arguments: object) -> Any:
    """What a benchmark writes as JSON to its `--out`, from a process of its own, so that its peak of memory is its own.

    What it prints goes to the terminal; SystemExit, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, script, *map(str, arguments), "--out", str(out)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        return json.loads(out.read_text(encoding="utf-8"))


def measured_side_by_side(script: str, jobs: Sequence[Sequence[object]], at_once: int) -> Iterator[tuple[int, Any]]:
    """What `measured_apart` gives for each job's arguments, with the job's number, as soon as it is there.

    Args:
        at_once: how many run at a time; each is told by `--at-once`, and keeps to its share of a GPU's memory.

    Raises:
        SystemExit: some failed, after the others were given.
    """
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        pending = {
            pool.submit(measured_apart, script, *job, "--at-once", at_once): number for number, job in enumerate(jobs)
        }
        for each in as_completed(pending):
            try:
                measured = each.result()
            except SystemExit as error:
                failed.append(str(error))
            else:
                yield pending[each], measured
    if failed:
        raise SystemExit("\n".join(failed))


def share_gpu(at_once: int) -> None:
    """Keeps this process to its share of a GPU's memory, where so many use it at a time."""
    if at_once > 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.95 / at_once)


def measured_by_each(processes: int, threads: int, *, split: bool, folder: Path, command: Sequence[str]) -> list[Any]:
    """What each of so many processes hands to `hand_in` with this folder.

    Args:
        processes: how many; one is not launched, but run.
        threads: that each computes with.
        split: whether weights are (FSDP2), where there are several.
        folder: for what is handed in.
        command: a script and its arguments.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_FSDP": str(split and processes > 1).lower()}
    whole = [sys.executable, *(launcher if processes > 1 else []), *command]
    subprocess.run(whole, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def hand_in(folder: Path, measured: Any) -> None:
    """Leaves what this process measured, and ends its part in the group of processes."""
    (folder / f"rank-{RANK}.json").write_text(json.dumps(measured), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def layers_of(folder: Path) -> int:
    """How many layers the model in a folder has."""
    layers: int = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    return layers


def timed(times: list[float], call: Callable[[], Any]) -> Any:
    """What a call gives; its seconds are added to `times`."""
    started = time.monotonic()
    result = call()
    times.append(time.monotonic() - started)
    return result


def finish(out: Path | None, record: Mapping[str, Any]) -> None:
    """Writes what was measured, if a file is named, and prints it."""
    if out:
        write_record(out, record, indent=1)
    print(json.dumps(record, indent=1))


def write_record(out: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes what was measured, whole or not at all."""
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    partial.replace(out)
