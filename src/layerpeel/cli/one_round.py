"""Removing layers once, and healing the gap: by repair in closed form, and by training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.cli.inputs import check_new_folder, check_room, load_layerwise
from layerpeel.cli.output import stdout
from layerpeel.cli.tables import repair_table
from layerpeel.config.distill import DistillConfig
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.architecture import count_parameters, find_architecture
from layerpeel.model.digests import digests
from layerpeel.model.layer_cycles import broken_cycle
from layerpeel.model.loading import load_teacher, teacher_options
from layerpeel.model.origin import StoredDtypes, stored_dtypes, teacher_origin
from layerpeel.model.removal import remove_from_files
from layerpeel.model.saving import save_model
from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.distributed import from_main
from layerpeel.processes.interrupts import interruptible
from layerpeel.processes.progress import shown
from layerpeel.run.preflight import check_streamed_text
from layerpeel.run.removal_card import HealingFacts, write_removal_card
from layerpeel.storage.files import remove_paths
from layerpeel.storage.outputs import beside
from layerpeel.training.repair_states import RepairState
from layerpeel.training.repairing import check_repair, repair_student
from layerpeel.training.result import RepairResult, TrainingResult
from layerpeel.training.rounds import distill, repair, train_student
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student
from layerpeel.training.teacher_text import with_teacher_text

Heal = Callable[
    [PreTrainedModel, PreTrainedTokenizerBase, DistillConfig, StoredDtypes], tuple[PreTrainedModel, HealingFacts, str]
]
"""Makes a student of a teacher; says what was done, for its card and in words."""


def distill_once(settings: RunConfig, layers: Sequence[int], folder: Path) -> None:
    """Removes layers from a config's teacher, repairs and distils the gap, and writes the student.

    The state of training is kept beside the folder until then: the same command goes on after an interruption.
    """
    if not settings.distill.tokens_per_round:
        raise InputError(
            "distill.tokens_per_round: 0, so there is nothing to do",
            hint="set it, or use `repair`, which needs no training, or `remove`",
        )

    def heal(
        teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DistillConfig, storage: StoredDtypes
    ) -> tuple[PreTrainedModel, HealingFacts, str]:
        state = _training_state(settings, layers, folder)
        student, result = distill(teacher, tokenizer, layers, config, seed=settings.seed, storage=storage, state=state)
        return student, HealingFacts.of(settings, result.repair, result), _trained(result)

    with interruptible():
        if settings.distill.weights == "stream":
            _heal_streamed(settings, layers, folder, train=True)
        else:
            _write_student(settings, layers, folder, heal)
    remove_paths(_state_path(folder))


def _training_state(settings: RunConfig, layers: Sequence[int], folder: Path) -> TrainingState:
    """Where the training of a teacher without these layers saves how far it is."""
    return TrainingState(_state_path(folder), _identity(settings, layers), settings.distill.save_every)


def _identity(settings: RunConfig, layers: Sequence[int]) -> str:
    """Says whose weights are healed: a saved state of others is not used. Of the text, the states say it themselves."""
    return json.dumps([sorted(layers), digests(settings.teacher, settings.revision), settings.dtype], sort_keys=True)


def _state_path(folder: Path) -> Path:
    return beside(folder, "-training")


def repair_once(settings: RunConfig, layers: Sequence[int], folder: Path) -> None:
    """Removes layers from a config's teacher, repairs the gap in closed form, and writes the student.

    What is solved is kept beside the folder until then: the same command goes on after an interruption.
    """
    kept = beside(folder, "-solved")

    def heal(
        teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DistillConfig, storage: StoredDtypes
    ) -> tuple[PreTrainedModel, HealingFacts, str]:
        student, result = repair(teacher, tokenizer, layers, config, seed=settings.seed, storage=storage, folder=kept)
        stdout.print(repair_table(result))
        return student, HealingFacts.of(settings, result, None), _solved(result)

    if settings.distill.weights == "stream":
        _heal_streamed(settings, layers, folder, train=False)
    else:
        _write_student(settings, layers, folder, heal)
        RepairState(kept, "").clear()


def _solved(result: RepairResult) -> str:
    return f"{len(result.layers)} of them repaired on {result.tokens:,} tokens in {result.seconds:.0f} s"


def _trained(result: TrainingResult) -> str:
    ends = result.summary()
    losses = f"loss {ends.first_loss:.4f} -> {ends.last_loss:.4f} over {result.tokens:,} tokens"
    return f"{losses} in {result.seconds:.0f} s"


def _heal_streamed(settings: RunConfig, layers: Sequence[int], folder: Path, *, train: bool) -> None:
    """Repairs, and trains, with the teacher's layers read as they run; writes the student from file to file.

    Args:
        train: whether to; else repair is all there is, and has to be possible.
    """
    config, solved = settings.distill, RepairState(beside(folder, "-solved"), _identity(settings, layers))
    check_new_folder(folder, settings.teacher)
    check_room(folder, settings.teacher, len(layers), **teacher_options(settings))
    if not train:
        check_repair(config)
    check_streamed_text("distill", config.text)
    layerwise, tokenizer = load_layerwise(settings, stream=True)
    student, training = Student(layerwise), None
    student.remove(layers)
    storage = stored_dtypes(teacher_origin(settings).with_layers(student.kept_layers.kept), layerwise.model)
    options: dict[str, Any] = {"seed": settings.seed, "storage": storage}
    repaired = repair_student(student, tokenizer, config, layers, state=solved, required=not train, **options)
    if repaired:
        stdout.print(repair_table(repaired))
        student.replaced = solved.tensors(repaired.layers)
    if train:
        state = _training_state(settings, layers, folder)
        training = train_student(student, tokenizer, config, state=state, **options)
    trained = {name: partial(torch.Tensor.detach, value) for name, value in student.trained_state().items()}
    replaced: Mapping[str, Callable[[], torch.Tensor]] = {**student.replaced, **trained}
    write = partial(remove_from_files, settings.teacher, layers, folder, replaced=replaced, **teacher_options(settings))
    removal = from_main(write)
    facts, sizes = HealingFacts.of(settings, repaired, training), (removal.parameters, removal.teacher_parameters)
    write_removal_card(folder, settings.teacher, removal.layers, *sizes, facts, removal.broken_cycle)
    if training:
        _say_written(folder, removal.layers, _trained(training), removal.broken_cycle)
    elif repaired:
        _say_written(folder, removal.layers, _solved(repaired), removal.broken_cycle)
    solved.clear()


def _write_student(settings: RunConfig, layers: Sequence[int], folder: Path, heal: Heal) -> None:
    """Loads a config's teacher, and writes the student that is made of it, with its card."""
    check_new_folder(folder, settings.teacher)
    check_room(folder, settings.teacher, len(layers), **teacher_options(settings))
    teacher, tokenizer = load_teacher(settings)
    kept = KeptLayers.full(len(find_architecture(teacher).layers)).without(layers)
    origin = teacher_origin(settings).with_layers(kept.kept)
    storage = stored_dtypes(origin, teacher)
    resolved, _ = with_teacher_text(settings, teacher, tokenizer, beside(folder, "-text"), scoring=False)
    student, facts, done = heal(teacher, tokenizer, resolved.distill, storage)
    save_model(student, tokenizer, folder, storage.main, origin)
    cycle = broken_cycle(teacher.config, kept.kept)
    write_removal_card(
        folder, settings.teacher, kept, count_parameters(student), count_parameters(teacher), facts, cycle
    )
    _say_written(folder, kept, done, cycle)


def _say_written(folder: Path, layers: KeptLayers, done: str, cycle: str | None) -> None:
    """Says where a student is, and what its removal means for other runtimes."""
    if cycle:
        stdout.print(f"note     {shown(cycle)}", soft_wrap=True)
    stdout.print(f"{len(layers)} layers, {done}: {shown(folder)}", soft_wrap=True)
