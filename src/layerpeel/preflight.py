"""What can be found wrong with a run before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from layerpeel.architecture import text_config
from layerpeel.config import RunConfig
from layerpeel.data import read_documents
from layerpeel.errors import InputError
from layerpeel.importance import check_metrics
from layerpeel.losses import LossSum
from layerpeel.models import load_config_of
from layerpeel.surgery import Depth
from layerpeel.tasks import Task, make_tasks


def check(config: RunConfig) -> list[Task]:
    """Checks a config against its model and its data; gives the tasks.

    Raises:
        InputError: it says what will not do.
    """
    teacher = load_config_of(config.teacher, trust_remote_code=config.trust_remote_code)
    total = text_config(teacher).num_hidden_layers
    _check_target(config, total)
    tasks = make_tasks(config.tasks)
    check_metrics(config.score, has_text=bool(config.score.text or config.distill.text), has_tasks=bool(tasks))
    LossSum(config.distill.losses)
    for task in tasks:
        task.check()
    for source in [*config.distill.text, *(config.score.text or [])]:
        next(read_documents(source), None)
    return tasks


def check_run(config: RunConfig) -> list[Task]:
    """What a run needs beyond `check`.

    Raises:
        InputError: it says what will not do.
    """
    if config.score.weights == "stream":
        raise InputError(
            "score.weights: stream is for `layerpeel score`; a run trains, and needs the model in memory",
            hint="set score.weights: memory",
        )
    for name in config.trackers:
        if not find_spec(name):
            raise InputError(f"trackers: {name} is not installed", hint=f"pip install {name}")
    return check(config)


def removable(depth: Depth, config: RunConfig, fixed: Iterable[int] = ()) -> tuple[int, ...]:
    """The teacher layers that may go next; at least one layer stays.

    Args:
        fixed: those without which the model could not be saved, from `importance.fixed_by_config`.
    """
    protect = config.score.protect
    return depth.removable(protect.first, protect.last, [*protect.layers, *fixed]) if len(depth) > 1 else ()


def _check_target(config: RunConfig, total: int) -> None:
    beyond = [layer for layer in config.score.protect.layers if not 0 <= layer < total]
    if beyond:
        raise InputError(
            f"score.protect.layers: there is no layer {beyond[0]}; the teacher's are 0 to {total - 1}",
            hint="layers are counted from 0",
        )
    free, target = len(removable(Depth.full(total), config)), config.stop.target_layers
    if not free:
        raise InputError(
            f"score.protect: all {total} layers are protected, so none can go", hint="protect fewer layers"
        )
    if target is not None and target >= total:
        raise InputError(
            f"stop.target_layers: {target} is not below the teacher's depth of {total} layers",
            hint=f"set it to {total - 1} or less",
        )
    if target is not None and target < total - free:
        raise InputError(
            f"stop.target_layers: {target} cannot be reached: {total - free} of {total} layers are protected",
            hint="raise the target, or protect fewer layers (score.protect)",
        )
