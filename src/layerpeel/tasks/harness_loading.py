"""Finding and loading tasks of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from layerpeel.errors import InputError, reason_of
from layerpeel.storage.hub import use_cache_without_hub

# The harness's own defaults: of examples, and of what a task's functions draw while it is loaded.
FEWSHOT_SEED, NUMPY_SEED, RANDOM_SEED = 1234, 1234, 0


class HarnessTasks(NamedTuple):
    """What a name stands for: tasks with documents (the leaves) and groups of them, by name."""

    leaves: dict[str, Any]
    groups: dict[str, Any]


def load_harness(name: str, include_path: str | None, num_fewshot: int | None, where: str) -> HarnessTasks:
    """Loads a task, a group or a tag, with its datasets.

    Args:
        name: one that the harness knows, or the path of a task's YAML file.
        include_path: a folder with more YAML files; that of the file, if `name` is one.
        num_fewshot: how many solved examples to show; each task's own number if not given.
        where: what the message of an error begins with.

    Raises:
        InputError: the harness is not installed or knows no such task, or the data cannot be read.
    """
    if not importlib.util.find_spec("lm_eval"):
        raise InputError(f"{where}: lm-evaluation-harness is not installed", hint="pip install 'layerpeel[eval]'")
    if not include_path and not _is_file(name):  # the harness's own, whose data is on the hub
        use_cache_without_hub()
    with quiet():
        manager = _manager_of(name, include_path, where)
        try:
            with _seeded():
                loaded = manager.load(name)
            for leaf in loaded["tasks"].values():
                _cache_templates(leaf)
                if num_fewshot is not None and leaf.get_config("num_fewshot") != 0:  # as the harness does
                    leaf.set_config(key="num_fewshot", value=num_fewshot)
        except Exception as error:
            raise InputError(
                f"{where}: its data or definition cannot be loaded ({reason_of(error)})",
                hint="check the task's files, the network and your access; datasets that are scripts are no longer "
                "loaded by `datasets`",
            ) from None
    return HarnessTasks(loaded["tasks"], loaded["groups"])


def build_instances(leaf: Any, where: str, **options: Any) -> list[list[Any]]:
    """A task's instances (the harness's requests), by document: as the harness builds them in a first call.

    Args:
        options: of the harness's `build_all_requests`.

    Raises:
        InputError: they cannot be built, say because there are too few examples.
    """
    leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
    with quiet(), _seeded(), refusing(f"{where}: {leaf.task_name}: its prompts cannot be built"):
        leaf.build_all_requests(rank=0, world_size=1, **options)
    by_document: dict[int, list[Any]] = {}
    for instance in leaf.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    return [sorted(instances, key=lambda instance: instance.idx) for instances in by_document.values()]


def _manager_of(name: str, include_path: str | None, where: str) -> Any:
    """An index of tasks that has this one; the harness's own tasks are read only if they have to be."""
    is_file = _is_file(name)
    folder = include_path or (str(Path(name).parent) if is_file else None)
    manager = _manager(folder, defaults=False)
    if is_file or name in manager.all_tasks:
        return manager
    manager = _manager(folder, defaults=True)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise InputError(
            f"{where}: lm-evaluation-harness knows no such task"
            + (f"; did you mean {' or '.join(close)}?" if close else ""),
            hint="`lm-eval ls tasks` lists them; name your own by their YAML file, or by include_path",
        )
    return manager


def _is_file(name: str) -> bool:
    """Whether a task is named by its YAML file."""
    return Path(name).suffix in (".yaml", ".yml")


@cache
def _manager(folder: str | None, *, defaults: bool) -> Any:
    """An index of the tasks in a folder and, with `defaults`, of the harness's own, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


def _cache_templates(leaf: Any) -> None:
    """Lets a task render each template once a document: the harness renders them anew for every model it scores."""
    for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        setattr(leaf, name, _cached_by_document(getattr(leaf, name)))


def _cached_by_document(render: Callable[..., Any]) -> Callable[..., Any]:
    results: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # holds the document too, so that no other can get its id

    def cached(doc: Any, *args: Any, **options: Any) -> Any:
        key = (id(doc), repr(args), repr(options))  # a template may be a list or a dict
        if key not in results:
            results[key] = (doc, render(doc, *args, **options))
        return results[key][1]

    return cached


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever the harness, or a function that a task's YAML names, raises into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what} ({type(error).__name__}: {reason_of(error)})",
            hint="lm-evaluation-harness fails with this too: mend the task's YAML, its functions or its data",
        ) from None


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's and numpy's global generators as the harness seeds them; as they were, afterwards."""
    state, numpy_state = random.getstate(), numpy.random.get_state()
    random.seed(RANDOM_SEED)
    numpy.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the harness's log, progress bars and prints."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
