"""Teacher and student on one micro-batch, in one walk over the layers; what both compute alike runs once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layerpeel.data.rows import labels_within, positions_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import NO_LABEL, StepOutputs
from layerpeel.model.layer_inputs import LayerInputs
from layerpeel.training.student import Student

FINAL = -1  # stands for the final norm among the indices of layers


def run_both(
    student: Student,
    batch: Mapping[str, Tensor],
    layers: Collection[int],
    *,
    step_tokens: int,
    step_labels: int,
    recompute: bool = False,
    teacher_states: Mapping[int, Tensor] | None = None,
) -> StepOutputs:
    """Teacher and student on one micro-batch; what they have in common runs once, without a graph.

    Args:
        batch: `input_ids`, `attention_mask`, `document` and `labels`, [B, T], right-padded.
        layers: teacher indices of the layers whose outputs are wanted, of those in training.
        step_tokens, step_labels: of the optimizer step, as in `StepOutputs`.
        recompute: keep only what enters each of the student's layers, and run them again in the backward pass.
        teacher_states: the teacher's, if they need not be computed: [B, T, D] of those layers, and of FINAL.
    """
    names = ("input_ids", "attention_mask", "labels")
    input_ids, mask, labels = (batch[name].to(student.model.device) for name in names)
    teacher, shared = student.teacher, student.shared_prefix
    with torch.no_grad():
        positions = positions_of(batch["document"])
        with student.embeddings_loaded():
            common, arguments = teacher.begin(input_ids, positions)
        for index in range(shared):
            with teacher.weights_loaded(index):
                common = teacher.layer(index, common, arguments[index])
    with student.embeddings_loaded() if student.trains_embeddings else nullcontext():
        hidden = student.layerwise.begin(input_ids, positions)[0] if student.trains_embeddings else common
    of_student, of_teacher = _upper_states(student, hidden, common, arguments, layers, recompute, teacher_states)
    return StepOutputs(
        student_final=of_student.pop(FINAL),
        teacher_final=of_teacher[FINAL],
        student_hidden=of_student,
        teacher_hidden=of_teacher,
        mask=mask.bool(),
        labels=labels,
        student_head=student.layerwise,
        teacher_head=teacher,
        step_tokens=step_tokens,
        step_labels=step_labels,
    )


def _upper_states(
    student: Student,
    of_student: Tensor,
    of_teacher: Tensor,
    arguments: list[LayerInputs],
    layers: Collection[int],
    recompute: bool,
    teacher_states: Mapping[int, Tensor] | None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Runs both from the first layer that differs; a layer that is streamed is read once for both.

    Args:
        of_student, of_teacher: hidden states that enter it.

    Returns:
        the outputs of `layers` and, under FINAL, of the final norm: the student's, and the teacher's.
    """
    teacher, states, needed = student.teacher, dict[int, Tensor](), dict(teacher_states or {})
    for index in range(student.shared_prefix, len(teacher.layers)):
        with nullcontext() if teacher_states else teacher.weights_loaded(index):
            if not teacher_states:
                of_teacher = _teacher_layer(teacher, index, of_teacher, arguments[index])
            if index in student.kept_layers.kept:
                of_student = _student_layer(student, index, of_student, arguments[index], recompute)
        if index in layers:
            states[index] = of_student
            needed.setdefault(index, of_teacher)
    if not teacher_states:
        with torch.no_grad():
            needed[FINAL] = teacher.norm(of_teacher)
    return states | {FINAL: student.layerwise.norm(of_student)}, needed


@torch.no_grad()
def _teacher_layer(teacher: LayerwiseModel, index: int, hidden: Tensor, arguments: LayerInputs) -> Tensor:
    return teacher.layer(index, hidden, arguments)


def _student_layer(student: Student, index: int, hidden: Tensor, arguments: LayerInputs, recompute: bool) -> Tensor:
    """Runs the student's version of a layer; where it is streamed, it is read again in the backward pass.

    Args:
        recompute: keep only what enters it, and run it again in the backward pass.
    """
    position = student.kept_layers.position(index)

    def run(hidden: Tensor) -> Tensor:
        with student.layer_loaded(position):
            return student.layerwise.layer(position, hidden, arguments)

    if torch.is_grad_enabled() and (recompute or student.is_streamed(position)):
        return checkpoint(run, hidden, use_reentrant=False)  # type: ignore[no-any-return]
    return run(hidden)


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The next token at each place of a batch, [B, T]; NO_LABEL where it is padding, or of another document."""
    input_ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return torch.where(labels_within(batch["document"], mask), input_ids.roll(-1, dims=1), NO_LABEL)
