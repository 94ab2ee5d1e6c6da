"""The kinds of task, by name."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from layerpeel.config.reading import describe
from layerpeel.config.run import TaskConfig
from layerpeel.errors import InputError, resolve_class
from layerpeel.tasks.base import Task
from layerpeel.tasks.choice import Choice
from layerpeel.tasks.generate import Generate
from layerpeel.tasks.harness import Harness
from layerpeel.tasks.pairs import Pairs
from layerpeel.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {
    "choice": Choice,
    "generate": Generate,
    "harness": Harness,
    "pairs": Pairs,
    "perplexity": Perplexity,
}


def make_tasks(configs: Sequence[TaskConfig]) -> list[Task]:
    """The tasks of a config.

    Raises:
        InputError: an unknown kind or option, or one that will not do.
    """
    return [_make_task(config) for config in configs]


def _make_task(config: TaskConfig) -> Task:
    task = resolve_class(config.kind, TASKS, "task kind", Task)
    try:
        return task.model_validate(config.model_dump())
    except ValidationError as error:
        raise InputError(
            f"task {config.name}: {describe(error, task)}",
            hint=f"options of {config.kind}: {', '.join(task.model_fields)}",
        ) from None
