"""Teacher and student on one micro-batch; what both compute alike runs once."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
    device = student.model.device
    input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()
    shared, teacher = student.shared_prefix, student.teacher
    with torch.no_grad():
        positions = positions_of(batch["document"])
        common, arguments = teacher.begin(input_ids, positions)
        for index in range(shared):
            common = teacher.layer(index, common, arguments[index])
        teacher_states = teacher_states or _upper_states(teacher, common, arguments, shared, layers)
    hidden = student.layerwise.begin(input_ids, positions)[0] if student.trains_embeddings else common
    final, student_states = _student_states(student, hidden, arguments, layers, recompute)
    return StepOutputs(
        student_final=final,
        teacher_final=teacher_states[FINAL],
        student_hidden=student_states,
        teacher_hidden=teacher_states,
        mask=mask,
        labels=batch["labels"].to(device),
        student_head=student.layerwise,
        teacher_head=teacher,
        step_tokens=step_tokens,
        step_labels=step_labels,
    )


def _student_states(
    student: Student, hidden: Tensor, arguments: list[LayerInputs], layers: Collection[int], recompute: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs the student after the shared prefix; returns the output of the final norm, and those of `layers`."""
    states: dict[int, Tensor] = {}
    for position in range(student.shared_prefix, len(student.kept_layers)):
        index = student.kept_layers.kept[position]
        if recompute and torch.is_grad_enabled():
            hidden = checkpoint(student.layerwise.layer, position, hidden, arguments[index], use_reentrant=False)
        else:
            hidden = student.layerwise.layer(position, hidden, arguments[index])
        if index in layers:
            states[index] = hidden
    return student.layerwise.norm(hidden), states


def _upper_states(
    teacher: LayerwiseModel, hidden: Tensor, arguments: list[LayerInputs], start: int, layers: Collection[int]
) -> dict[int, Tensor]:
    """Runs the teacher from a layer on; returns the outputs of `layers` and, under FINAL, of the final norm."""
    states = {}
    for index in range(start, len(teacher.layers)):
        hidden = teacher.layer(index, hidden, arguments[index])
        if index in layers:
            states[index] = hidden
    return states | {FINAL: teacher.norm(hidden)}


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The next token at each place of a batch, [B, T]; NO_LABEL where it is padding, or of another document."""
    input_ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return torch.where(labels_within(batch["document"], mask), input_ids.roll(-1, dims=1), NO_LABEL)
