"""The runs of a study: what they share is done once, and several may run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from layerpeel.config.run import RunConfig
from layerpeel.errors import RunError
from layerpeel.model.loading import load_teacher
from layerpeel.processes.progress import console
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.preflight import check_run
from layerpeel.study.file import Job
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.student import Student

SHARED = ("teacher", "tasks", "aggregate", "device", "dtype", "trust_remote_code")  # what a teacher's scores depend on


def run_jobs(jobs: Sequence[Job], processes: int) -> list[Run]:
    """Runs what is not finished; gives all runs, in the order of the jobs.

    Args:
        processes: runs at a time, each in a process with its share of the cores; 1: all in this one.

    Raises:
        InputError: a config, a model or the data will not do; found before any run starts.
        RunError: runs failed; the others are done, and running again goes on.
    """
    for job in jobs:
        check_run(job.config)
    _share_teachers([job.config for job in jobs])
    left = [job for job in jobs if not Run(job.config.output).finish]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished before")
    scorers = {_what_scores(job.config): job for job in reversed(jobs)}  # the first of those that score alike
    first = [job for job in left if scorers[_what_scores(job.config)] is job]
    for wave in (first, [job for job in left if job not in first]):
        for job in wave:
            _share_scores(Run(scorers[_what_scores(job.config)].config.output), job.config)
        _run(wave, processes)
    return [Run(job.config.output) for job in jobs]


def _run(jobs: Sequence[Job], processes: int) -> None:
    if processes > 1:
        _run_apart(jobs, processes)
        return
    for job in jobs:
        console.print(f"{job.variant}, seed {job.config.seed}", style="bold", markup=False)
        peel(job.config)


def _what_scores(config: RunConfig) -> str:
    """All that the first scoring of a run depends on; a run that heals on trial shares with none."""
    own = config.model_dump(mode="json")
    score = {name: value for name, value in own["score"].items() if name != "every"}
    read = [own["score"]["text"] or own["distill"]["text"], own["distill"]["sequence_length"], own["seed"]]
    alone = own["output"] if config.score.heal else None
    return json.dumps([score, read, alone, *(own[name] for name in SHARED)])


def _share_scores(source: Run, config: RunConfig) -> None:
    """Writes the scores of another run's teacher, which are this one's, into its journal."""
    if not source.rounds or source.folder == config.output:
        return
    with Run.open(config) as run:
        if not run.rounds and not run.scored:
            run.record("scored", **{name: source.rounds[0][name] for name in ("round", "removed", "scores")})


def _share_teachers(configs: Sequence[RunConfig]) -> None:
    """Writes each run's first events; teachers that are measured alike are measured once."""
    measured: dict[str, dict[str, Any]] = {}
    for config in configs:
        key = json.dumps({name: config.model_dump(mode="json")[name] for name in SHARED})
        with Run.open(config) as run:
            if not run.teacher and key in measured:
                run.record("teacher", **measured[key])
            elif not run.teacher:
                _measure(run, config)
            assert run.teacher
            own = ("event", "time", "checksum")  # of the event, not of the teacher
            measured[key] = {name: value for name, value in run.teacher.items() if name not in own}


def _measure(run: Run, config: RunConfig) -> None:
    model, tokenizer = load_teacher(config)
    run.record_teacher(Student(model), evaluate(model, tokenizer, make_tasks(config.tasks)))


def _run_apart(jobs: Sequence[Job], processes: int) -> None:
    with ThreadPoolExecutor(processes) as pool:
        failed = [
            job for job, code in zip(jobs, pool.map(lambda job: _spawn(job, processes), jobs), strict=True) if code
        ]
    if failed:
        logs = [job.config.output / "log.txt" for job in failed]
        lines = logs[0].read_text(encoding="utf-8").splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error:")), "it said nothing")
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed, the first of them {failed[0].variant}, seed "
            f"{failed[0].config.seed}: {last.removeprefix('error: ')}",
            hint=f"see {logs[0]}; the same command goes on with what is left",
        )


def _spawn(job: Job, processes: int) -> int:
    """Runs a job in a process of its own; gives its exit code."""
    folder = job.config.output
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = [sys.executable, "-m", "layerpeel", "run", str(folder / "config.yaml"), "--no-report"]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
    code = 0 if done.returncode == 3 else done.returncode  # a quality floor is an end like others
    console.print(f"{job.variant}, seed {job.config.seed}: {'failed' if code else 'done'}", markup=False)
    return code
