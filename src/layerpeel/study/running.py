"""Runs the runs of a study: shared measurements are made once, and several may run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from layerpeel.config.run import RunConfig
from layerpeel.errors import LayerpeelError, RunError, reason_of
from layerpeel.inference.loading import load_layerwise
from layerpeel.processes.memory import LESS_MEMORY, memory_is_full
from layerpeel.processes.progress import console
from layerpeel.run.events import Event, Scored, TeacherRecord
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.opening import FIXED, open_run
from layerpeel.run.preflight import check_run
from layerpeel.run.writing import OpenRun
from layerpeel.storage.outputs import disk_is_full
from layerpeel.study.file import Job
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.student import Student

# Fields that a teacher's scores depend on.
SHARED = (*FIXED, "device", "attn_implementation", "trust_remote_code")


@dataclass(frozen=True)
class Failure:
    """A run that failed, as its words: the exception would keep the run's models in memory.

    Attributes:
        job: the run's.
        message: what was wrong.
        hint: what the user can do about it.
    """

    job: Job
    message: str
    hint: str | None


def run_jobs(jobs: Sequence[Job], processes: int) -> list[Run]:
    """Runs the jobs that are not finished.

    Args:
        processes: how many run at a time, each in a process with its share of the cores; 1: all in this process.

    Returns:
        all runs, in the order of the jobs.

    Raises:
        InputError: a config, a model or the data is not usable; found before any run starts.
        RunError: runs failed; the others are finished, and running again resumes those.
    """
    for job in jobs:
        check_run(job.config)
    _share_teachers([job.config for job in jobs])
    left = [job for job in jobs if not Run(job.config.output).finish]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished before")
    scorers = {_scoring_key(job.config): job for job in reversed(jobs)}  # the first of those that score alike
    first = [job for job in left if scorers[_scoring_key(job.config)] is job]
    failures: list[Failure] = []
    for wave in (first, [job for job in left if job not in first]):
        for job in wave:
            _share_scores(Run(scorers[_scoring_key(job.config)].config.output), job.config)
        failures += _run(wave, processes)
    if failures:
        raise _error_of(failures, len(left))
    return [Run(job.config.output) for job in jobs]


def _error_of(failures: Sequence[Failure], count: int) -> RunError:
    """The error that names the runs that failed.

    Args:
        count: of the runs that were made.
    """
    names = [f"{failure.job.variant}, seed {failure.job.config.seed}" for failure in failures]
    first = failures[0]
    others = f" (the others: {'; '.join(names[1:])})" if names[1:] else ""
    return RunError(
        f"{len(failures)} of {count} runs failed, the first of them {names[0]}: {first.message}{others}",
        hint=f"{first.hint}; " * bool(first.hint)
        + "the same command goes on with what is left, and a study without the variants that failed has its tables",
    )


def _run(jobs: Sequence[Job], processes: int) -> list[Failure]:
    """Runs jobs, also after one that fails; returns those that did."""
    if processes > 1:
        return _run_apart(jobs, processes)
    return [failure for job in jobs if (failure := _run_here(job))]


def _run_here(job: Job) -> Failure | None:
    """Runs a job in this process; a full disk, on which all others would fail, too, is raised."""
    console.print(f"{job.variant}, seed {job.config.seed}", style="bold", markup=False)
    try:
        peel(job.config)
    except LayerpeelError as error:
        if error.__context__ and disk_is_full(error.__context__):
            raise
        failure = Failure(job, str(error), error.hint)
    except Exception as error:
        if not memory_is_full(error):
            raise
        failure = Failure(job, f"out of memory ({reason_of(error)})", LESS_MEMORY)
    else:
        return None
    console.print(f"failed: {failure.message}", markup=False, soft_wrap=True)
    return failure


def _scoring_key(config: RunConfig) -> str:
    """A key of all that the first scoring of a run depends on; a run that heals candidates shares with none."""
    fields = config.model_dump(mode="json")
    score = {name: value for name, value in fields["score"].items() if name != "every"}
    text = [fields["score"]["text"] or fields["distill"]["text"], fields["distill"]["sequence_length"], fields["seed"]]
    unshared = fields["output"] if config.score.heal else None
    return json.dumps([_teacher_key(config), score, text, unshared])


def _share_scores(source: Run, config: RunConfig) -> None:
    """Records another run's first scores in the journal of a run that would score the same."""
    if not source.rounds or source.folder == config.output:
        return
    with open_run(config) as run:
        if not run.rounds and not run.scored:
            first = source.rounds[0]
            run.record(Scored(round=first.number, removed=first.removed, scores=first.scores))


def _share_teachers(configs: Sequence[RunConfig]) -> None:
    """Records the teacher in each run's journal; teachers whose scores depend on the same fields are measured once."""
    measured: dict[str, TeacherRecord] = {}
    for config in configs:
        key = _teacher_key(config)
        with open_run(config) as run:
            if not run.teacher and key in measured:
                fields = {name: value for name, value in measured[key] if name not in Event.model_fields}
                run.record(TeacherRecord(**fields))
            elif not run.teacher:
                _measure(run, config)
            assert run.teacher
            measured[key] = run.teacher


def _teacher_key(config: RunConfig) -> str:
    """A key of all that a teacher's scores depend on."""
    fields = config.model_dump(mode="json")
    return json.dumps([fields[name] for name in SHARED])


def _measure(run: OpenRun, config: RunConfig) -> None:
    teacher, tokenizer = load_layerwise(config, stream=config.streams)
    run.record_teacher(Student(teacher), evaluate(teacher, tokenizer, make_tasks(config.tasks)))


def _run_apart(jobs: Sequence[Job], processes: int) -> list[Failure]:
    with ThreadPoolExecutor(processes) as pool:
        codes = pool.map(lambda job: _spawn(job, processes), jobs)
        return [_failure_in_log(job) for job, code in zip(jobs, codes, strict=True) if code]


def _failure_in_log(job: Job) -> Failure:
    log = job.config.output / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines()
    message = next((line for line in reversed(lines) if line.startswith("error:")), "it said nothing")
    return Failure(job, message.removeprefix("error: "), f"see {log}")


def _spawn(job: Job, processes: int) -> int:
    """Runs a job in another process, with its output in log.txt; returns its exit code (0 at a quality floor, too)."""
    folder = job.config.output
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = [sys.executable, "-m", "layerpeel", "run", str(folder / "config.yaml"), "--no-report"]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
    code = 0 if process.returncode == 3 else process.returncode  # 3: stopped by the quality floor
    console.print(f"{job.variant}, seed {job.config.seed}: {'failed' if code else 'done'}", markup=False)
    return code
