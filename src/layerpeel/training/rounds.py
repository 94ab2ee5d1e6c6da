"""What is trained and on what text: in a round, after the last one, and on trial."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.distill import DistillConfig
from layerpeel.config.run import RunConfig
from layerpeel.data.token_store import TokenStore
from layerpeel.errors import InputError
from layerpeel.inference.teacher_text import TeacherWriter
from layerpeel.model.digests import digest_of_weights
from layerpeel.model.origin import StoredDtypes
from layerpeel.processes.distributed import processes_of
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.repair_states import RepairState
from layerpeel.training.repairing import check_repair, repair_student
from layerpeel.training.result import Log, RepairResult, TrainingResult, TrainingSummary
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache
from layerpeel.training.text import TrainingText
from layerpeel.training.trainer import Trainer


def train_student(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillConfig,
    *,
    seed: int = 0,
    round_number: int = 1,
    before: Sequence[TrainingSummary] = (),
    storage: torch.dtype | StoredDtypes = torch.float32,
    cache: TeacherCache | None = None,
    state: TrainingState | None = None,
    log: Log | None = None,
    description: str = "distilling",
    texts: TokenStore | None = None,
) -> TrainingResult:
    """Trains what `config` names, and leaves the weights in the student.

    Parameters train in fp32 and then hold what `storage` can: what is measured is what is saved. Dropout stays off.

    Args:
        seed: of the text and its order.
        round_number: counted from 1; later rounds shuffle their rows differently.
        before: the trainings that the student has been through; this one goes on in the text where they stopped.
        cache, state, log, description: as for `Trainer`; on a CPU a resumed training gives the same to the last bit.
        texts: as for `load_rows`.

    Raises:
        InputError: nothing to train, or no text.
        RunError: training diverged, whatever the learning rate.
    """
    recipe = TrainingRecipe(config, processes_of(student.model.device).num_processes)
    if not recipe.steps():
        return TrainingResult(layers=[])
    if student.model.dtype is torch.float16:
        raise InputError("dtype: float16 gradients would underflow", hint="train with dtype: bfloat16 or float32")
    started = time.monotonic()
    names, text = recipe.parameters(student), TrainingText.after(before, recipe, student)
    rows = text.load(tokenizer, seed, texts)
    state = state and state.for_training(text.settings(rows, seed, round_number))
    trainer = Trainer(student, names, recipe, cache=cache, state=state, log=log, description=description)
    result = trainer.train(rows, seed + round_number)
    stored = storage if isinstance(storage, StoredDtypes) else StoredDtypes(storage)
    student.load_trained({n: value.to(stored.of(n)) for n, value in student.trained_state().items() if n in names})
    result.seconds += time.monotonic() - started
    return result


def train_last(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    before: Sequence[TrainingSummary] = (),
    *,
    storage: torch.dtype | StoredDtypes,
    cache: TeacherCache | None,
    state: TrainingState | None,
    log: Log | None,
    texts: TokenStore | None,
) -> TrainingResult:
    """The training after the last removal, as `distill.at_end` says.

    Args:
        before: the trainings of the rounds that the student has been through.
        storage, cache, state, log, texts: as for `train_student`.
    """
    distill = config.distill.at_end(len(student.kept_layers.removed))
    assert distill
    number = len(student.kept_layers.removed) + 1
    return train_student(
        student,
        tokenizer,
        distill,
        seed=config.seed,
        round_number=number,
        before=before,
        storage=storage,
        cache=cache,
        state=state,
        log=log,
        description="last pass",
        texts=texts,
    )


def distill(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    removed: Iterable[int],
    config: DistillConfig,
    *,
    seed: int = 0,
    storage: torch.dtype | StoredDtypes | None = None,
    state: TrainingState | None = None,
) -> tuple[PreTrainedModel, TrainingResult]:
    """Removes layers from a teacher, repairs the gap in closed form where `repair` says so, and trains for one round.

    Text that the teacher is to write (`from: teacher`) is kept only as long as that takes.

    Args:
        teacher: stays as it is; the student shares all its weights but those that train.
        removed: teacher layers to remove, counted from 0.
        storage: the dtype that the student will be saved in; the teacher's if not given.
        state: where training saves how far it is, and goes on from; of these layers and this teacher.

    Returns:
        the student, a model of the teacher's class, and what training did.

    Raises:
        InputError: a layer is not there, the config selects nothing to train, or there is no text.
    """
    student, removed = Student(teacher), list(removed)
    student.remove(removed)
    stored = storage or teacher.dtype
    with _teacher_text_written(student, tokenizer, config, seed) as config:
        repaired = repair_student(student, tokenizer, config, removed, seed=seed, storage=stored)
        result = train_student(student, tokenizer, config, seed=seed, storage=stored, state=state)
    result.repair = repaired
    return student.model, result


def repair(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    removed: Iterable[int],
    config: DistillConfig,
    *,
    seed: int = 0,
    storage: torch.dtype | StoredDtypes | None = None,
    folder: str | Path | None = None,
) -> tuple[PreTrainedModel, RepairResult]:
    """Removes layers from a teacher and repairs the gap in closed form, without gradients.

    Args:
        teacher: stays as it is; the student shares all its weights but those that are repaired.
        removed: teacher layers to remove, counted from 0.
        config: with `repair` and the text.
        storage: the dtype that the student will be saved in; the teacher's if not given.
        folder: where solved projections are kept, so that a repair that was stopped goes on there, if teacher, layers,
            text and options are the same; it may be removed afterwards.

    Returns:
        the student, a model of the teacher's class, and what repair did.

    Raises:
        InputError: a layer is not there, there is no text, or no projection that can be told to write to the hidden
            states.
    """
    check_repair(config)
    student, removed = Student(teacher), list(removed)
    student.remove(removed)
    state = RepairState(Path(folder), digest_of_weights(teacher)) if folder else None
    stored = storage or teacher.dtype
    with _teacher_text_written(student, tokenizer, config, seed) as config:
        options: dict[str, Any] = {"seed": seed, "storage": stored, "state": state, "required": True}
        result = repair_student(student, tokenizer, config, removed, **options)
    assert result
    return student.model, result


@contextmanager
def _teacher_text_written(
    student: Student, tokenizer: PreTrainedTokenizerBase, config: DistillConfig, seed: int
) -> Iterator[DistillConfig]:
    """The config with what the teacher is to write (`from: teacher`) in a folder, which is there for the context."""
    with TemporaryDirectory() as folder:
        writer = TeacherWriter(
            student.teacher,
            tokenizer,
            Path(folder),
            teacher=None,
            length=config.sequence_length,
            tokens=config.text_tokens(1),
            seed=seed,
        )
        yield config.model_copy(update={"text": writer.resolve(config.text)})
