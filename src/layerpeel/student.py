"""The student that borrows the teacher's frozen layers: one copy of the weights.

The student is a model of its own class, with its own config and layer list, whose parameters *are* the teacher's, but
for the layers in training, which are copies.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.stack import Stack
from layerpeel.surgery import Depth, remove_layers


class Student:
    """A shortened model that shares all weights with its teacher but those it owns.

    Attributes:
        model: the student, a plain transformers model.
        stack: its layers, to be run one by one.
        teacher: the teacher's layers.
        depth: which teacher layers the student still has.
        owned: teacher indices of the layers whose weights are the student's own.
    """

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.teacher = Stack(teacher)
        self.model = share(teacher).requires_grad_(False)
        self.stack = Stack(self.model)
        self.depth = Depth.full(len(self.stack.layers))
        self.owned: set[int] = set()

    def layer(self, index: int) -> nn.Module:
        """The student's version of a teacher layer."""
        return self.stack.layers[self.depth.position(index)]

    def remove(self, layers: Iterable[int]) -> None:
        """Removes teacher layers from the student; the teacher stays as it is."""
        layers = list(layers)
        depth = self.depth.without(layers)
        remove_layers(self.model, [self.depth.position(layer) for layer in layers])
        self.depth = depth
        self.owned -= set(layers)

    def branch(self) -> Student:
        """Another student of the same teacher, at the same point, to try something on."""
        other = Student(self.teacher.model)
        other.remove(self.depth.removed)
        other.load_owned(self.owned_state())
        return other

    def own(self, layers: Iterable[int]) -> None:
        """Gives the student its own copy of these layers' weights, to be trained."""
        for index in sorted(set(layers) - self.owned):
            for module in self.layer(index).modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            self.owned.add(index)

    @property
    def shared_prefix(self) -> int:
        """How many of the first layers teacher and student both run, with the same weights."""
        own = (position for position, index in enumerate(self.depth.kept) if index in self.owned)
        return min(next(own, len(self.depth)), self.depth.first_changed)

    def owned_state(self) -> dict[str, Tensor]:
        """The weights that are the student's own, named as in the teacher's state dict."""
        prefix = self.stack.architecture.layer_prefix()
        return {
            f"{prefix}.{index}.{name}": value
            for index in sorted(self.owned)
            for name, value in self.layer(index).state_dict().items()
        }

    @torch.no_grad()
    def load_owned(self, state: dict[str, Tensor]) -> None:
        """Takes over weights that `owned_state` gave."""
        prefix = self.stack.architecture.layer_prefix()
        layers: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            number, rest = name.removeprefix(f"{prefix}.").split(".", 1)
            layers.setdefault(int(number), {})[rest] = value
        self.own(layers)
        for index, weights in layers.items():
            self.layer(index).load_state_dict(weights)

    @torch.no_grad()
    def round_owned(self, dtype: torch.dtype) -> None:
        """Rounds owned weights to what `dtype` can hold, so that what is measured is what will be saved."""
        for index in self.owned:
            for parameter in self.layer(index).parameters():
                parameter.copy_(parameter.to(dtype))


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with its own modules and config, and the same parameter and buffer tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def layers_to_train(student: Student, train: str, radius: int) -> dict[int, list[str]]:
    """Which parameters of which teacher layers a round trains.

    Args:
        train: `neighbours` of every gap within `radius`, `above` the first gap, `all`, or a regular expression that
            is searched in parameter names such as `model.layers.7.mlp.up_proj.weight` (teacher indices).

    Returns:
        for each layer in training, the names of its trained parameters.

    Raises:
        InputError: nothing matches.
    """
    depth = student.depth
    sets = {"neighbours": depth.neighbours(radius), "above": depth.above(), "all": depth.kept}
    prefix = student.stack.architecture.layer_prefix()
    pattern = re.compile("" if train in sets else train)
    chosen = {
        index: [n for n, _ in student.layer(index).named_parameters() if pattern.search(f"{prefix}.{index}.{n}")]
        for index in sets.get(train, depth.kept)
    }
    chosen = {index: names for index, names in chosen.items() if names}
    if not chosen:
        raise InputError(
            f"distill.train: {train!r} selects no parameter of the student",
            hint=f"use neighbours, above, all, or a pattern that matches names such as "
            f"{prefix}.{depth.kept[0]}.{next(iter(student.layer(depth.kept[0]).named_parameters()))[0]}",
        )
    return chosen
