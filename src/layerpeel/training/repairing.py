"""Repair of a student, from the text to the result; see `repair` for how."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from layerpeel.config.distill import DistillConfig
from layerpeel.data.batches import load_rows
from layerpeel.data.rows import Rows
from layerpeel.data.token_store import TokenStore
from layerpeel.errors import InputError
from layerpeel.inference.front import Front, batch_rows, share_of
from layerpeel.model.origin import StoredDtypes
from layerpeel.processes.progress import console, print_once, progress
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.repair import RepairWalk, writers_at
from layerpeel.training.repair_states import RepairState
from layerpeel.training.result import RepairResult
from layerpeel.training.student import Student
from layerpeel.training.text import settings_hash


@torch.no_grad()
def repair_student(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillConfig,
    removed: Iterable[int],
    *,
    seed: int = 0,
    storage: torch.dtype | StoredDtypes = torch.float32,
    state: RepairState | None = None,
    required: bool = False,
    texts: TokenStore | None = None,
) -> RepairResult | None:
    """Repairs a student's projections in closed form, and leaves the weights in it.

    Args:
        config: with `repair` and the text.
        removed: the teacher layers that went since the last repair: it begins with the layer before the first.
        seed: of the text.
        storage: what repaired weights are rounded to, so that what is measured is what will be saved.
        state: where this teacher's are kept, once solved; a repair that was stopped gives the same to the last bit.
        required: whether to refuse a model that cannot be repaired, instead of leaving it as it is.
        texts: as for `load_rows`.

    Returns:
        what was done; None if there is no text, the model cannot be repaired, or the config says that it should not.

    Raises:
        InputError: there is no text, or no layer whose projections can be told.
        Interrupted: a stop was asked for; what was solved is saved.
    """
    repairs = config.repairs
    if not repairs or not can_repair(student, required=required):
        return None
    started = time.monotonic()
    rows = _load_rows(student, tokenizer, config, repairs.tokens, seed, texts)
    start = start_of(student, removed)
    stored = storage if isinstance(storage, StoredDtypes) else StoredDtypes(storage)
    ridge = None if repairs.ridge == "auto" else repairs.ridge
    state = state and state.for_repair(settings_hash(rows.digest(), student.kept_layers.kept, start, ridge, stored))
    with _front(student, rows, state, passes(student, start)) as front:
        walk = RepairWalk(student, front, start, ridge, stored.of, state)
        walk.walk()
    walk.result.seconds += time.monotonic() - started
    console.print(describe(walk.result), style="dim")
    return walk.result


def describe(result: RepairResult) -> str:
    """What a repair did, in a line."""
    most = result.most
    if not most:
        return f"repair left all as it was: nothing does better on text held back ({result.tokens:,} tokens)"
    last = [each for each in result.projections if each.ridge is not None][-1]
    return (
        f"repaired {len(result.layers)} layers in {result.seconds:.0f} s, {result.tokens:,} tokens: error of layer "
        f"{most.layer} {most.before:.4f} -> {most.after:.4f}, of the last {last.before:.4f} -> {last.after:.4f}"
    )


def check_repair(config: DistillConfig) -> None:
    """Checks that a config says how to repair, and on what.

    Raises:
        InputError: it does not.
    """
    if not config.repairs:
        raise InputError(
            "distill.text: expected text to repair on" if config.repair else "distill.repair: false, so nothing to do",
            hint="set distill.text and distill.repair, or use `remove`",
        )


def can_repair(student: Student, *, required: bool = False) -> bool:
    """Whether the projections of some layer can be told; says so once where none can be.

    Raises:
        InputError: none can be, and `required` says that they have to.
    """
    if any(map(partial(writers_at, student), range(len(student.kept_layers)))):
        return True
    reason = f"{type(student.model).__name__}: its layers do not add the output of a projection to their hidden states"
    if required:
        raise InputError(f"{reason}, so they cannot be repaired", hint="use `distill`, or `remove`")
    print_once(f"no repair in closed form: {reason}")
    return False


def _load_rows(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillConfig,
    tokens: int,
    seed: int,
    texts: TokenStore | None,
) -> Rows:
    return load_rows(
        config.text,
        tokenizer,
        sequence_length=config.sequence_length,
        packing=TrainingRecipe(config).packing(student.teacher),
        max_tokens=tokens,
        seed=seed,
        texts=texts,
    )


def start_of(student: Student, removed: Iterable[int]) -> int:
    """The position of the student where a repair begins: before the first of these removed layers."""
    return max(0, sum(layer < min(removed) for layer in student.kept_layers.kept) - 1)


def passes(student: Student, start: int) -> int:
    """How often a repair runs the text through a layer."""
    kept = student.kept_layers
    again = sum(gap > start for gap in kept.gaps)  # the layer before a gap, with what attention writes changed
    return start + kept.total + 2 * (len(kept) - start) + again


@contextmanager
def _front(student: Student, rows: Rows, state: RepairState | None, total: int) -> Iterator[Front]:
    """This process's rows, and room for their hidden states; a bar shows how often they have gone through a layer.

    Args:
        total: how often they will.
    """
    part, held = share_of(rows, student.model.device)
    batches = -(-len(part) // batch_rows(student.teacher, part))
    with (
        progress("repairing", total * batches) as advance,
        Front(student.teacher, part, held, state.folder if state else None, advance) as front,
    ):
        yield front
