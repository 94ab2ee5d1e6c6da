"""The student that borrows the teacher's frozen layers: one copy of the weights.

The student is a model of its own class, with its own config and layer list, whose parameters *are* the teacher's, but
for those in training, which are copies. Below the first that differs, both compute the same, and it runs once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.losses import NO_LABEL, StepOutputs
from layerpeel.stack import LayerArguments, Stack
from layerpeel.surgery import Depth, remove_layers

FINAL = -1  # stands for the final norm among the indices of layers


class Student:
    """A shortened model that shares all weights with its teacher but those it owns.

    Parameters are named as in the teacher, such as `model.layers.7.mlp.up_proj.weight`, whatever has been removed.

    Attributes:
        model: the student, a plain transformers model.
        stack: its layers, to be run one by one.
        teacher: the teacher's layers.
        depth: which teacher layers the student still has.
        owned: names of the parameters that are the student's own.
    """

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.teacher = Stack(teacher)
        self.model = share(teacher).requires_grad_(False)
        self.stack = Stack(self.model)
        self.depth = Depth.full(len(self.stack.layers))
        self.owned: set[str] = set()

    def layer(self, index: int) -> nn.Module:
        """The student's version of a teacher layer."""
        return self.stack.layers[self.depth.position(index)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name; tied ones once."""
        prefix = f"{self.stack.architecture.layer_prefix()}."
        named = {}
        for name, parameter in self.model.named_parameters():
            if name.startswith(prefix):
                position, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{self.depth.kept[int(position)]}.{rest}"
            named[name] = parameter
        return named

    def layer_of(self, name: str) -> int | None:
        """The teacher layer that a parameter is of; None if it is of no layer."""
        found = re.match(re.escape(self.stack.architecture.layer_prefix()) + r"\.(\d+)\.", name)
        return int(found[1]) if found else None

    def remove(self, layers: Iterable[int]) -> None:
        """Removes teacher layers from the student; the teacher stays as it is."""
        layers = list(layers)
        depth = self.depth.without(layers)
        remove_layers(self.model, [self.depth.position(layer) for layer in layers])
        self.depth = depth
        self.owned = {name for name in self.owned if self.layer_of(name) not in layers}

    def branch(self) -> Student:
        """Another student of the same teacher, at the same point, to try something on."""
        other = Student(self.teacher.model)
        other.remove(self.depth.removed)
        other.load_owned(self.owned_state())
        return other

    def own(self, names: Iterable[str]) -> None:
        """Gives the student its own copy of these parameters, to be trained."""
        here, new = self.parameters(), set(names) - self.owned
        copies = {id(here[name]): nn.Parameter(here[name].detach().clone(), requires_grad=False) for name in new}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in copies:
                    module._parameters[name] = copies[id(parameter)]
        self.owned |= new

    @property
    def begins_alone(self) -> bool:
        """Whether the student has embeddings of its own, so that it shares nothing with the teacher's forward."""
        after = [*self.stack.norm_module.parameters(), *self.stack.head_module.parameters()]
        before = {id(p) for p in self.model.get_input_embeddings().parameters()}
        late = {id(p) for p in after} - before
        here = self.parameters()
        return any(self.layer_of(name) is None and id(here[name]) not in late for name in self.owned)

    @property
    def shared_prefix(self) -> int:
        """How many of the first layers teacher and student both run, with the same weights, on the same input."""
        if self.begins_alone:
            return 0
        own = {self.layer_of(name) for name in self.owned}
        first_own = next((p for p, layer in enumerate(self.depth.kept) if layer in own), len(self.depth))
        return min(first_own, self.depth.first_changed)

    def owned_state(self) -> dict[str, Tensor]:
        """The weights that are the student's own, by name."""
        here = self.parameters()
        return {name: here[name].detach() for name in sorted(self.owned)}

    @torch.no_grad()
    def load_owned(self, state: Mapping[str, Tensor]) -> None:
        """Takes over weights that `owned_state` gave."""
        self.own(state)
        here = self.parameters()
        for name, value in state.items():
            here[name].copy_(value)


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with its own modules and config, and the same parameter and buffer tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def parameters_to_train(
    student: Student, train: str, *, radius: int = 1, norm: bool = False, head: bool = False
) -> list[str]:
    """The names of the parameters that a round trains.

    Args:
        train: `neighbours` of every gap within `radius`, `above` the first gap, `all` layers, `everything` there is, or
            a regular expression that is searched in names such as `model.layers.7.mlp.up_proj.weight`.
        norm, head: the final norm, the head too. Where the head is tied to the embeddings, both are trained.

    Raises:
        InputError: nothing matches.
    """
    depth, here = student.depth, student.parameters()
    sets = {"neighbours": depth.neighbours(radius), "above": depth.above(), "all": depth.kept}
    if train in sets:
        chosen = {name for name in here if student.layer_of(name) in sets[train]}
    else:
        chosen = {name for name in here if train == "everything" or re.search(train, name)}
    if not chosen:
        raise InputError(
            f"distill.train: {train!r} selects no parameter of the student",
            hint="use neighbours, above, all, everything, or a pattern that matches names such as "
            f"{next(name for name in here if student.layer_of(name) is not None)}",
        )
    also = [module for module, on in ((student.stack.norm_module, norm), (student.stack.head_module, head)) if on]
    wanted = {id(parameter) for module in also for parameter in module.parameters()}
    return [name for name, parameter in here.items() if name in chosen or id(parameter) in wanted]


def run_both(
    student: Student,
    batch: Mapping[str, Tensor],
    layers: Collection[int],
    *,
    step_tokens: int,
    step_labels: int,
    micro_batches: int = 1,
    recompute: bool = False,
    known: Mapping[int, Tensor] | None = None,
) -> StepOutputs:
    """Teacher and student on one micro-batch; what they have in common runs once, without a graph.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, [B, T], right-padded.
        layers: teacher indices of the layers whose outputs are wanted, of those in training.
        step_tokens, step_labels, micro_batches: of the optimizer step, as in `StepOutputs`.
        recompute: keep only what enters each of the student's layers, and run them again in the backward pass.
        known: the teacher's states, if they need not be computed: [B, T, D] of those layers, and of FINAL.
    """
    device = student.model.device
    input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()
    shared, teacher = student.shared_prefix, student.teacher
    with torch.no_grad():
        common, arguments = teacher.begin(input_ids)
        for index in range(shared):
            common = teacher.layer(index, common, arguments[index])
        theirs = known or _upper_states(teacher, common, arguments, shared, layers)
    hidden = student.stack.begin(input_ids)[0] if student.begins_alone else common
    ours: dict[int, Tensor] = {}
    for position in range(shared, len(student.depth)):
        index = student.depth.kept[position]
        if recompute and torch.is_grad_enabled():
            hidden = checkpoint(student.stack.layer, position, hidden, arguments[index], use_reentrant=False)
        else:
            hidden = student.stack.layer(position, hidden, arguments[index])
        if index in layers:
            ours[index] = hidden
    return StepOutputs(
        student_final=student.stack.norm(hidden), teacher_final=theirs[FINAL],
        student_hidden=ours, teacher_hidden=theirs, mask=mask,
        labels=batch["labels"].to(device), student_head=student.stack, teacher_head=teacher,
        step_tokens=step_tokens, step_labels=step_labels, micro_batches=micro_batches,
    )  # fmt: skip


def _upper_states(
    teacher: Stack, hidden: Tensor, arguments: list[LayerArguments], start: int, layers: Collection[int]
) -> dict[int, Tensor]:
    """The teacher from a layer on: what those layers and, under FINAL, the final norm give."""
    states = {}
    for index in range(start, len(teacher.layers)):
        hidden = teacher.layer(index, hidden, arguments[index])
        if index in layers:
            states[index] = hidden
    return states | {FINAL: teacher.norm(hidden)}


def next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """The next token at each place, [B, T] -> [B, T]; NO_LABEL where it is padding or beyond the row."""
    labels = torch.full_like(input_ids, NO_LABEL)
    labels[:, :-1] = torch.where(mask[:, :-1].bool() & mask[:, 1:].bool(), input_ids[:, 1:], NO_LABEL)
    return labels
