"""Where the data and the teacher of a run are: a run is told by what they hold, not by their paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.reading import load_config, read_override, resolve_paths
from layerpeel.config.run import RunConfig
from layerpeel.data.digests import digest_of_text
from layerpeel.errors import InputError
from layerpeel.model.digests import digests
from layerpeel.model.loading import load_teacher
from layerpeel.run.events import DataDigests
from layerpeel.run.folder import Run
from layerpeel.tasks.base import Task


def data_digests(config: RunConfig, tasks: Iterable[Task]) -> DataDigests:
    """What the tasks and the texts of a config hold now."""
    return DataDigests(
        tasks={task.name: digest for task in tasks if (digest := task.digest())},
        text={place: digest for place, source in config.files_of_text().items() if (digest := digest_of_text(source))},
    )


def changed_data(config: RunConfig, before: DataDigests, now: DataDigests) -> dict[str, str]:
    """In words, by what it is of, what the data of a run hold that they did not hold before."""
    changes = {
        f"tasks.{name}": f"tasks: the rows of '{name}' are others than when the run began"
        for name, digest in before.tasks.items()
        if now.tasks.get(name, digest) != digest
    }
    for place, source in config.files_of_text().items():
        if before.text.get(place, now.text.get(place)) != now.text.get(place) and place in now.text:
            section = place.rpartition(".")[0]
            changes[place] = f"{section}: the text in {source.path} is another than when the run began"
    return changes


def with_places_of(
    before: dict[str, Any], wanted: dict[str, Any], recorded: DataDigests, now: DataDigests, *, same_teacher: bool
) -> dict[str, Any]:
    """A config as JSON, with the paths of another wherever these lead to what was recorded.

    Args:
        before, wanted: as JSON; `before` is changed.
        same_teacher: whether the wanted teacher is a folder that holds the recorded one's files.
    """
    before["output"] = wanted["output"]
    if same_teacher:
        before["teacher"] = wanted["teacher"]
    for section in ("distill", "score"):
        for number, (old, new) in enumerate(_pairs(before[section]["text"], wanted[section]["text"])):
            place = f"{section}.text.{number}"
            if _both(recorded.text, now.text, place):
                old["path"] = new["path"]
            if _both(recorded.text, now.text, f"{place}.prompts"):
                old["prompts"]["path"] = new["prompts"]["path"]
    for old, new in _pairs(before["tasks"], wanted["tasks"]):
        if old["name"] == new["name"] and _both(recorded.tasks, now.tasks, old["name"]):
            paths = ("data", "fewshot_data", "include_path", *(["task"] if os.path.isfile(new.get("task", "")) else []))
            old |= {key: new[key] for key in paths if key in old and key in new}
    return before


def load_run_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Reads a config as `load_config`; of the copy in a run's folder, the output is that folder, wherever it is now."""
    config = load_config(path, [*overrides])
    if path.name != "config.yaml" or not (path.parent / "journal.jsonl").is_file():
        return config
    fields = [text.partition("=")[0].strip() for text in overrides]
    run = Run(path.parent)
    if run.events:
        config = _moved(config, run)
    return config if "output" in fields else config.model_copy(update={"output": path.parent})


def find_places(run: Run, overrides: Sequence[str] = ()) -> None:
    """Lets a run's config name its teacher, text and tasks where they are now.

    Args:
        overrides: `teacher=PATH`, where the teacher is.

    Raises:
        InputError: an override is of something else.
    """
    config = _moved(run.config, run)
    for text in overrides:
        config = resolve_paths(config.model_copy(update={"teacher": teacher_place(text)}), Path())
    run.located = config


def teacher_place(override: str) -> str:
    """The PATH of `teacher=PATH`.

    Raises:
        InputError: the override is of something else.
    """
    field, value = read_override(override)
    if field != "teacher" or not isinstance(value, str):
        raise InputError(f"--set {override}: only the teacher's place can be set here", hint="as in --set teacher=PATH")
    return value


def load_run_teacher(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the teacher of a run.

    Raises:
        InputError: it is gone, or another than when the run began.
    """
    return load_teacher(checked_teacher(run))


def checked_teacher(run: Run) -> RunConfig:
    """The config that a run's teacher is loaded by, once it is known to be there and the same.

    Raises:
        InputError: it is gone, or another than when the run began.
    """
    config = run.pinned_config
    if os.path.isabs(config.teacher) and not os.path.isdir(config.teacher):
        raise InputError(
            f"teacher: {config.teacher} is gone", hint="bring it back, or say where it is now: --set teacher=PATH"
        )
    check_teacher(run, digests(config.teacher, config.revision), config.teacher)
    return config


def check_teacher(run: Run, teacher_files: dict[str, str], path: str) -> None:
    """Checks that a teacher is that of a run.

    Args:
        teacher_files: what `digests` says of it now.
        path: where it is, for the message.

    Raises:
        InputError: it is another.
    """
    assert run.start
    changed = changed_files(run, teacher_files)
    if changed:
        raise InputError(
            f"teacher: {path} is another than when the run began ({', '.join(changed[:3])})",
            hint=f"{_same_teacher(run.start.teacher_files)}, or name a new output folder (--set output=...)",
        )


def _same_teacher(teacher_files: dict[str, str]) -> str:
    """How to go on with the teacher that a run began with."""
    commit = teacher_files.get("commit")
    back = "bring the old files back, say where they are now (--set teacher=PATH)"
    return f"go on with --set revision={commit}" if commit else back


def changed_files(run: Run, teacher_files: dict[str, str]) -> list[str]:
    """The names of the teacher's files that are others than when the run began."""
    before = run.start.teacher_files if run.start else {}
    return sorted(name for name in {**before, **teacher_files} if before.get(name) != teacher_files.get(name))


def _moved(config: RunConfig, run: Run) -> RunConfig:
    """A config with the paths that lead nowhere replaced by those that lie to the run's folder as they did before."""
    config = config.model_copy(deep=True)
    if not run.recorded_folder:
        return config
    start = os.path.abspath(run.folder)

    def place(path: str) -> str:
        if not os.path.isabs(path):
            return path
        moved = os.path.normpath(os.path.join(start, os.path.relpath(path, run.recorded_folder)))
        return moved if not _leads_somewhere(path) and _leads_somewhere(moved) else path

    teacher = place(config.teacher)
    if teacher == config.teacher and os.path.isabs(teacher):
        beside = os.path.normpath(os.path.join(start, os.path.relpath(teacher, run.recorded_folder)))
        gone = changed_files(run, digests(teacher)) if os.path.isdir(teacher) and os.path.isdir(beside) else []
        teacher = beside if gone and not changed_files(run, digests(beside)) else teacher
    config.teacher = teacher
    for source in config.files_of_text().values():
        source.path = place(source.path)
    for task in config.tasks:
        for key in task.paths:
            setattr(task, key, place(getattr(task, key)))
    return config


def _leads_somewhere(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path)))


def _pairs(before: list[Any] | None, wanted: list[Any] | None) -> Iterator[tuple[Any, Any]]:
    return zip(before or [], wanted or [], strict=False)


def _both(recorded: dict[str, str], now: dict[str, str], name: str) -> bool:
    return name in recorded and recorded[name] == now.get(name)
