"""What can be found wrong with a run before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import psutil
import torch
from transformers import PretrainedConfig

from layerpeel.config.fields import TeacherTextConfig, TextConfig, TextSource, file_of
from layerpeel.config.run import RunConfig, StopConfig
from layerpeel.data.documents import read_documents
from layerpeel.errors import InputError
from layerpeel.importance.metrics import check_metrics, reads_text
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.checkpoint import least_parameters
from layerpeel.model.config_fields import context_length, text_config
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.model.forward_switches import check_attention
from layerpeel.model.loading import load_teacher_config
from layerpeel.model.surgery import KeptLayers
from layerpeel.run.folder import Run
from layerpeel.run.teacher_checks import check_pattern, note_cycle
from layerpeel.storage.files import remove_folder, remove_paths
from layerpeel.storage.outputs import check_output
from layerpeel.tasks.base import Task
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.recipe import TrainingRecipe

BYTES_PER_TOKEN = 9  # of text that waits in memory: its id, which document, and whether it is padding


def check(config: RunConfig) -> list[Task]:
    """Checks a config against its model and its data; gives the tasks.

    Raises:
        InputError: it says what will not do.
    """
    tasks = check_plan(config)
    check_output(config.output, config.teacher)
    _check_text(config.files_of_text().values())
    return tasks


def check_plan(config: RunConfig) -> list[Task]:
    """As `check`, but for the training text, which need not be here, and the output, which need not be writable."""
    _check_streamed(config)
    check_teacher(config)
    tasks = check_tasks(config)
    check_metrics(config.score, has_text=bool(config.score.text or config.distill.text), has_tasks=bool(tasks))
    LossSum(config.distill.losses)
    if config.distill.trains:
        TrainingRecipe(config.distill).check(pick_device(config.device))
    return tasks


def check_teacher(config: RunConfig) -> None:
    """Checks a config against its model alone: when the run is over, sizes, and which layers may go.

    Raises:
        InputError: it says what will not do.
    """
    if config.stop == StopConfig.model_construct():
        raise InputError(
            "stop: not given, and a run has to know when it is over",
            hint="give at least one of target_layers, min_quality, max_params, as in --set stop.target_layers=24",
        )
    teacher, total = _teacher_of(config)
    _check_sizes(config, teacher)
    _check_target(config, total)
    check_pattern(config, teacher, removable(KeptLayers.full(total), config))


def check_tasks(config: RunConfig) -> list[Task]:
    """Checks the data of a config's tasks; gives the tasks.

    Raises:
        InputError: it says what will not do.
    """
    tasks = make_tasks(config.tasks)
    for task in tasks:
        task.check()
    return tasks


def check_score(config: RunConfig) -> list[Task]:
    """Checks what scoring once needs: nothing that is to be trained, and no target; gives the tasks.

    Raises:
        InputError: it says what will not do.
    """
    teacher, total = _teacher_of(config)
    _check_sizes(config, teacher, training=False)
    _check_protected(config, total)
    check_pattern(config, teacher, removable(KeptLayers.full(total), config))
    tasks = check_tasks(config)
    text = config.score.text or config.distill.text
    check_metrics(config.score, has_text=bool(text), has_tasks=bool(tasks))
    if reads_text(config.score):
        _check_text(filter(None, map(file_of, text)))
        if config.score.weights == "stream":
            check_streamed_text("score", text)
    return tasks


def _teacher_of(config: RunConfig) -> tuple[PretrainedConfig, int]:
    """The config of the teacher, and how many layers it has."""
    teacher, device = load_teacher_config(config), pick_device(config.device)
    check_attention(config.attn_implementation, device, wanted_dtype(teacher, device, config.dtype))
    total = text_config(teacher).num_hidden_layers
    if not isinstance(total, int) or total < 2:
        raise InputError(f"{config.teacher}: a model of {total} layers has none to spare", hint="name a deeper one")
    return teacher, total


def check_streamed_text(section: str, text: Iterable[TextSource]) -> None:
    """Refuses text that a teacher would have to write whose layers are not in memory.

    Args:
        section: of the config, whose `weights` says that they are not.

    Raises:
        InputError: it would.
    """
    if any(isinstance(source, TeacherTextConfig) for source in text):
        raise InputError(
            f"{section}.weights: stream reads every layer from disk for every token that the teacher would write",
            hint=f"give text in place of {{from: teacher}}, or use {section}.weights: memory",
        )


def _check_streamed(config: RunConfig) -> None:
    """Checks that a run reads layers from the disk in all that it does, or in nothing; and its text, if it does."""
    weights = {"score": config.score.weights, "distill": config.distill.weights}
    if len(set(weights.values())) > 1:
        streamed, in_memory = sorted(weights, key=lambda name: weights[name] == "memory")
        raise InputError(
            f"{streamed}.weights: stream, and {in_memory}.weights: memory; a run reads its layers from disk in all "
            "that it does, or in nothing",
            hint=f"set {in_memory}.weights: stream, too",
        )
    if config.streams:
        for name, text in (("distill", config.distill.text), ("score", config.score.text or [])):
            check_streamed_text(name, text)


def _check_text(sources: Iterable[TextConfig]) -> None:
    for source in sources:
        next(read_documents(source), None)


def check_training_dtype(config: RunConfig) -> None:
    """Refuses float16 where something trains, as training itself would, later.

    Raises:
        InputError: it is wanted, by the config or by the checkpoint.
    """
    teacher = load_teacher_config(config)
    dtype = wanted_dtype(teacher, pick_device(config.device), config.dtype)
    if config.distill.trains and dtype is torch.float16:
        raise InputError("dtype: float16 gradients would underflow", hint="train with dtype: bfloat16 or float32")


def check_run(config: RunConfig) -> list[Task]:
    """What a run needs beyond `check`.

    Raises:
        InputError: it says what will not do.
    """
    check_training_dtype(config)
    for name in config.trackers:
        if not find_spec(name):
            raise InputError(f"trackers: {name} is not installed", hint=f"pip install {name}")
    tasks = check(config)
    for folder in (config.output / name for name in ("rounds", "student", "report", "cache", "text")):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output: {folder} is a file, where a folder of the run has to be", hint="move it away")
    note_cycle(config, load_teacher_config(config))
    return tasks


@contextmanager
def leaving_nothing(run: Run) -> Iterator[None]:
    """Takes a run's folder away again, if it has just been made and what comes first is refused."""
    try:
        yield
    except InputError:
        if [event.event for event in run.events] == ["start"]:
            remove_paths(run.text_folder)
            remove_folder(run.folder, ("config.yaml", "journal.jsonl"))
        raise


def removable(kept_layers: KeptLayers, config: RunConfig, fixed: Iterable[int] = ()) -> tuple[int, ...]:
    """The teacher layers that may go next; at least one layer stays.

    Args:
        fixed: those without which the model could not be saved, from `importance.unremovable_teacher_layers`.
    """
    protect = config.score.protect
    return kept_layers.removable(protect.first, protect.last, [*protect.layers, *fixed]) if len(kept_layers) > 1 else ()


def _check_sizes(config: RunConfig, teacher: PretrainedConfig, *, training: bool = True) -> None:
    """Refuses what surely takes more memory than there is: far too large numbers, before they are allocated.

    Args:
        training: whether anything will train; else only what scoring takes is looked at.
    """
    distill, text = config.distill, text_config(teacher)
    recipe = TrainingRecipe(distill)
    tokens = distill.sequence_length * recipe.micro_batch_rows
    hidden = 2 * 2 * tokens * getattr(text, "hidden_size", 0) if distill.text else 0  # in 16 bits, of two models
    steps = config.score.heal.steps if config.score.heal else 0
    last = (distill.last_pass and distill.last_pass.tokens) or 0
    in_memory = least_parameters(teacher) if config.score.weights == "memory" else 0
    needs = {
        "teacher": 2 * in_memory,
        "distill.sequence_length x distill.batch_size": hidden,
        "distill.tokens_per_round": BYTES_PER_TOKEN * distill.tokens_per_round,
        "distill.repair.tokens": BYTES_PER_TOKEN * distill.repairs.tokens if distill.repairs else 0,
        "distill.last_pass.tokens": BYTES_PER_TOKEN * last,
        "score.heal.steps": BYTES_PER_TOKEN * recipe.step_tokens * steps,
        "score.tokens": BYTES_PER_TOKEN * config.score.tokens,
        "score.memory": config.score.memory or 0,
    }
    if not training:
        needs = {name: size for name, size in needs.items() if name == "teacher" or name.startswith("score.")}
        needs["teacher"] = in_memory
    limit = config.memory_limit or machine_memory()
    for name, size in needs.items():
        if size > limit:
            raise InputError(
                f"{name}: it takes {size / 1e9:,.1f} GB of memory or more, and there are {limit / 1e9:,.1f} GB",
                hint="lower it, or set memory_limit to what there is, as in --set memory_limit=200GB",
            )
    longest = context_length(teacher)
    if (distill.text or config.score.text) and longest and distill.sequence_length > longest:
        raise InputError(
            f"distill.sequence_length: {distill.sequence_length} is more than the {longest} tokens that the teacher "
            "was made for",
            hint=f"set it to {longest} or less",
        )


def machine_memory() -> int:
    """Bytes of this machine's memory in all, that of its GPUs included."""
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return int(psutil.virtual_memory().total + psutil.swap_memory().total + sum(gpus))


def _check_protected(config: RunConfig, total: int) -> int:
    """How many of a teacher's layers may go.

    Raises:
        InputError: none may, or a layer is named that is not there.
    """
    beyond = [layer for layer in config.score.protect.layers if not 0 <= layer < total]
    if beyond:
        raise InputError(
            f"score.protect.layers: there is no layer {beyond[0]}; the teacher's are 0 to {total - 1}",
            hint="layers are counted from 0",
        )
    free = len(removable(KeptLayers.full(total), config))
    if not free:
        raise InputError(
            f"score.protect: all {total} layers are protected, so none can go", hint="protect fewer layers"
        )
    return free


def _check_target(config: RunConfig, total: int) -> None:
    free, target = _check_protected(config, total), config.stop.target_layers
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
