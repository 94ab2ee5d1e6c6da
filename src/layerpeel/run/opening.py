"""A run that begins or goes on: its folder is locked, and what still holds of it is found out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.markup import escape

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.devices import pick_device
from layerpeel.model.digests import digests
from layerpeel.processes.distributed import processes_of, wait_for_all
from layerpeel.processes.interrupts import interruptible
from layerpeel.processes.progress import console
from layerpeel.run.events import Back, Changed, DataDigests, Moved, Resume, Start
from layerpeel.run.folder import REPORTED, Run
from layerpeel.run.machine import describe_machine, installed_versions
from layerpeel.run.places import changed_data, changed_files, check_teacher, data_digests, with_places_of
from layerpeel.run.writing import OpenRun
from layerpeel.storage.files import full_disk_named, make_folder, sweep, write_whole
from layerpeel.storage.hash_chain import cut_torn_line
from layerpeel.storage.lock import claim
from layerpeel.storage.outputs import absolute
from layerpeel.tasks.base import Task
from layerpeel.tasks.registry import make_tasks

# What the rounds of a run were measured with and by: other values need another folder, `--accept-changes` or not.
FIXED = ("teacher", "revision", "merge_adapter", "dtype", "tasks", "aggregate")


@contextmanager
def open_run(
    config: RunConfig, tasks: Sequence[Task] | None = None, *, accept_changes: bool = False
) -> Iterator[OpenRun]:
    """Starts a run in `config.output`, or goes on with the one there; for the time of the context no other can.

    Args:
        tasks: of the config, if they are made.
        accept_changes: goes on with this config where it differs in other fields than FIXED.

    Raises:
        InputError: the folder holds something else, a run with another config or teacher, or one that another
            process works on; or it cannot be written to.
        RunError: files are damaged, or, in the context, the disk is full.
    """
    folder = config.output
    processes_of(pick_device(config.device))
    with full_disk_named(folder), interruptible():
        make_folder(folder, "journal.jsonl")
        wait_for_all()
        with claim(folder / "journal.jsonl") as granted:
            if not granted:
                raise InputError(
                    f"output: {folder} is being worked on by process {_last_process(Run(folder))}",
                    hint="wait for it, stop it, or name another folder (--set output=...)",
                )
            cut_torn_line(folder / "journal.jsonl")
            sweep(folder)
            wait_for_all()
            run = OpenRun(folder)
            _begin(run, config, make_tasks(config.tasks) if tasks is None else tasks, accept_changes)
            yield run


def _begin(run: OpenRun, config: RunConfig, tasks: Sequence[Task], accept_changes: bool) -> None:
    """Starts a run, or finds out what of it still holds."""
    teacher_files = digests(config.teacher, config.revision)
    data = data_digests(config, tasks)
    if not run.events:
        run.record(_start(config, teacher_files, data))
    else:
        _check_config(run, config, teacher_files, data, accept_changes)
        check_teacher(run, teacher_files, config.teacher)
        _check_files(run)
        if not run.finish:
            _resume(run)
    copy = run.folder / "config.yaml"
    if not copy.exists() or copy.read_bytes() != run.config_text.encode():
        write_whole(copy, run.config_text)


def _start(config: RunConfig, teacher_files: dict[str, str], data: DataDigests) -> Start:
    return Start(
        config=config,
        teacher_files=teacher_files,
        data=data,
        folder=str(absolute(config.output)),
        versions=installed_versions(),
        machine=describe_machine(),
        trust_remote_code=config.trust_remote_code,
        process=os.getpid(),
    )


def _check_config(
    run: OpenRun, config: RunConfig, teacher_files: dict[str, str], data: DataDigests, accept_changes: bool
) -> None:
    """Compares the config and the data with those on record; other paths to the same content are only noted."""
    wanted, before = config.model_dump(mode="json"), run.config.model_dump(mode="json")
    same_teacher = os.path.isdir(config.teacher) and not changed_files(run, teacher_files)
    same_paths = before | {"output": wanted["output"]} == wanted
    before = with_places_of(before, wanted, run.data, data, same_teacher=same_teacher)
    if not changed_files(run, teacher_files):
        before["revision"] = wanted["revision"]  # another name of the same commit
    differences = changed_data(config, run.data, data) | _differences(before, wanted)
    folder = str(absolute(config.output))
    if not differences:
        if not same_paths:
            run.record(Moved(config=config, folder=folder))
        return
    fixed = [name for name in differences if name.split(".")[0] in FIXED]
    if fixed or not accept_changes:
        accept = "" if fixed else ", or go on with the change from here (`layerpeel run … --accept-changes`)"
        raise InputError(
            f"output: {run.folder} holds another run: {'; '.join(list(differences.values())[:3])}",
            hint=f"name a new output folder, or undo the change to go on with that run{accept}",
        )
    changes = list(differences.values())
    run.record(Changed(to=len(run.rounds), config=config, changes=changes, data=data, folder=folder))


def _check_files(run: OpenRun) -> None:
    """Goes back to the last round whose files are as they were written, or to before the finish; names the rest."""
    if run.finish and (name := run.damaged_file(run.finish)):
        _go_back(run, len(run.rounds), name)
    damaged = {each.number: list(run.damaged_files(each)) for each in run.rounds}
    needed = 2 if run.config.stop.min_quality else 1  # the last student above the floor may be the result
    while not run.finish:
        last = [(each.number, name) for each in run.rounds[-needed:] for name in damaged[each.number]]
        number, name = next((pair for pair in last if not pair[1].endswith(REPORTED)), (0, ""))
        if not name:
            break
        _go_back(run, number - 1, name)
    for each in run.rounds:
        for name in damaged[each.number]:
            lost = "only reports read it" if name.endswith(REPORTED) else "that round cannot be exported any more"
            console.print(escape(f"{run.folder / name}: damaged or gone; {lost}"), soft_wrap=True)


def _go_back(run: OpenRun, number: int, name: str) -> None:
    message = f"{run.folder / name}: damaged or gone; going on from the end of round {number}"
    console.print(escape(message), soft_wrap=True)
    run.record(Back(to=number, damaged=name))


def _resume(run: OpenRun) -> None:
    """Records that a process goes on, and with which versions, if they are others."""
    versions, before = installed_versions(), _last_versions(run)
    changed = [name for name, installed in versions.items() if before.get(name) != installed]
    if changed:
        listed = ", ".join(f"{name} {before.get(name)} -> {versions[name]}" for name in changed)
        console.print(f"versions have changed since the run was here last: {listed}", style="yellow")
    run.record(Resume(process=os.getpid(), versions=versions if changed else None, changed=changed))


def _last_versions(run: Run) -> dict[str, str]:
    return next(
        event.versions for event in reversed(run.events) if isinstance(event, Start | Resume) and event.versions
    )


def _last_process(run: Run) -> int | str:
    """The process that worked on the run last."""
    return next((event.process for event in reversed(run.events) if isinstance(event, Start | Resume)), "another")


def _differences(before: Any, wanted: Any, field: str = "") -> dict[str, str]:
    """By the name of the field, what it was and is."""
    if isinstance(before, dict) and isinstance(wanted, dict):
        return {
            name: message
            for key in {**before, **wanted}
            for name, message in _differences(before.get(key), wanted.get(key), f"{field}.{key}".lstrip(".")).items()
        }
    return {} if before == wanted else {field: f"{field} is {before!r} there and {wanted!r} in this config"}
