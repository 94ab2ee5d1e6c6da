"""Finding and loading tasks of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from layerpeel.errors import InputError

FEWSHOT_SEED = 1234  # the harness's own default


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
    with quiet():
        manager = _manager_of(name, include_path, where)
        try:
            loaded = manager.load(name)
            for leaf in loaded["tasks"].values():
                _cache_templates(leaf)
                if num_fewshot is not None and leaf.get_config("num_fewshot") != 0:  # as the harness does
                    leaf.set_config(key="num_fewshot", value=num_fewshot)
                leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"{where}: its data or definition cannot be loaded ({reason})",
                hint="check the task's files, the network and your access; datasets that are scripts are no longer "
                "loaded by `datasets`",
            ) from None
    return HarnessTasks(loaded["tasks"], loaded["groups"])


def _manager_of(name: str, include_path: str | None, where: str) -> Any:
    """An index of tasks that has this one; the harness's own tasks are read only if they have to be."""
    is_file = Path(name).suffix in (".yaml", ".yml")
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
        key = (id(doc), args, tuple(options.items()))
        if key not in results:
            results[key] = (doc, render(doc, *args, **options))
        return results[key][1]

    return cached


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the harness's log and progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
