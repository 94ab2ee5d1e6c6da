"""Removing layers once, and healing the gap: by repair in closed form, and by training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpeel.cli.inputs import check_new_folder, check_room
from layerpeel.cli.output import stdout
from layerpeel.cli.tables import repair_table
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.inference.loading import load_layerwise
from layerpeel.model.architecture import count_parameters
from layerpeel.model.digests import digests
from layerpeel.model.layer_cycles import broken_cycle
from layerpeel.model.loading import teacher_options
from layerpeel.model.origin import stored_dtypes, teacher_origin
from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.interrupts import interruptible
from layerpeel.processes.progress import shown
from layerpeel.run.preflight import check_streamed_text
from layerpeel.run.removal_card import HealingFacts, write_removal_card
from layerpeel.storage.files import remove_paths
from layerpeel.storage.outputs import beside
from layerpeel.training.repair_states import RepairState
from layerpeel.training.repairing import check_repair, repair_student
from layerpeel.training.result import RepairResult, TrainingResult
from layerpeel.training.rounds import train_student
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student
from layerpeel.training.teacher_text import with_teacher_text
from layerpeel.training.writing import write_student


def distill_once(settings: RunConfig, layers: Sequence[int], folder: Path) -> None:
    """Removes layers from a config's teacher, repairs and distils the gap, and writes the student."""
    if not settings.distill.tokens_per_round:
        raise InputError(
            "distill.tokens_per_round: 0, so there is nothing to do",
            hint="set it, or use `repair`, which needs no training, or `remove`",
        )
    _heal_once(settings, layers, folder, train=True)


def repair_once(settings: RunConfig, layers: Sequence[int], folder: Path) -> None:
    """Removes layers from a config's teacher, repairs the gap in closed form, and writes the student."""
    check_repair(settings.distill)
    _heal_once(settings, layers, folder, train=False)


def _heal_once(settings: RunConfig, layers: Sequence[int], folder: Path, *, train: bool) -> None:
    """Repairs, and trains, with the teacher in memory or read layer by layer, and writes the student with its card.

    What is solved and trained is kept beside the folder until then: the same command goes on after an interruption.

    Args:
        train: whether to; else repair is all there is, and has to be possible.
    """
    streamed = settings.distill.weights == "stream"
    check_new_folder(folder, settings.teacher)
    check_room(folder, settings.teacher, len(layers), **teacher_options(settings))
    if streamed:
        check_streamed_text("distill", settings.distill.text)
    with interruptible():
        teacher, tokenizer = load_layerwise(settings, stream=streamed)
        student, training = Student(teacher), None
        student.remove(layers)
        storage = stored_dtypes(teacher_origin(settings), teacher.model)
        resolved, _ = with_teacher_text(settings, teacher, tokenizer, beside(folder, "-text"), scoring=False)
        config, solved, state = resolved.distill, *_states(settings, layers, folder)
        options: dict[str, Any] = {"seed": settings.seed, "storage": storage}
        repaired = repair_student(student, tokenizer, config, layers, state=solved, required=not train, **options)
        if repaired:
            stdout.print(repair_table(repaired))
        if train:
            training = train_student(student, tokenizer, config, state=state, **options)
        write_student(student, tokenizer, settings, folder)
    facts, kept = HealingFacts.of(settings, repaired, training), student.kept_layers
    cycle = broken_cycle(teacher.model.config, kept.kept)
    sizes = count_parameters(student.model), count_parameters(teacher.model)
    write_removal_card(folder, settings.teacher, kept, *sizes, facts, cycle)
    _say_written(folder, kept, _done(repaired, training), cycle)
    remove_paths(solved.folder, state.folder)


def _states(settings: RunConfig, layers: Sequence[int], folder: Path) -> tuple[RepairState, TrainingState]:
    """Where a repair and a training save how far they are, beside the folder.

    They are told whose weights are healed, so that a state of others is not used; of the text, they know themselves.
    """
    healed = [sorted(layers), digests(settings.teacher, settings.revision), settings.dtype]
    key = json.dumps(healed, sort_keys=True)
    every = settings.distill.save_every
    return RepairState(beside(folder, "-solved"), key), TrainingState(beside(folder, "-training"), key, every)


def _done(repaired: RepairResult | None, training: TrainingResult | None) -> str:
    """What was done, in words."""
    if training:
        ends = training.summary()
        losses = f"loss {ends.first_loss:.4f} -> {ends.last_loss:.4f} over {training.tokens:,} tokens"
        return f"{losses} in {training.seconds:.0f} s"
    assert repaired
    return f"{len(repaired.layers)} of them repaired on {repaired.tokens:,} tokens in {repaired.seconds:.0f} s"


def _say_written(folder: Path, layers: KeptLayers, done: str, cycle: str | None) -> None:
    """Says where a student is, and what its removal means for other runtimes."""
    if cycle:
        stdout.print(f"note     {shown(cycle)}", soft_wrap=True)
    stdout.print(f"{len(layers)} layers, {done}: {shown(folder)}", soft_wrap=True)
