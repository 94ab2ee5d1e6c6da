"""Names of a checkpoint's tensors: which are of a layer, and what they are called once layers are gone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from layerpeel.model.architecture import Architecture

NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


@dataclass(frozen=True)
class LayerNames:
    """How tensors of layers are named: prefix, the layer's number, the rest.

    Attributes:
        prefix: such as `model.layers`.
    """

    prefix: str

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor is of; None if it is of none."""
        match = re.match(rf"{re.escape(self.prefix)}\.([0-9]+)\.", name)
        return int(match[1]) if match else None

    def renumbered(self, name: str, layer: int) -> str:
        """The name of a layer's tensor, as one of another layer."""
        rest = name.removeprefix(f"{self.prefix}.").split(".", 1)[1]
        return f"{self.prefix}.{layer}.{rest}"

    def find(self, name: str, names: Iterable[str], prefix: str) -> str | None:
        """What a tensor is called among `names`, whose layers are under `prefix`.

        Some checkpoints leave out the base model's name, such as `transformer.`, and a model's own names have it.
        """
        names = names if isinstance(names, (dict, set)) else set(names)
        layer = self.layer_of(name)
        if layer is not None:
            other = f"{prefix}.{layer}.{name.removeprefix(f'{self.prefix}.{layer}.')}"
            return other if other in names else None
        short, long = sorted((self.prefix, prefix), key=len)
        added = long.removesuffix(short) if long.endswith(short) else ""
        options = (name, f"{added}{name}", name.removeprefix(added) if added else name)
        return next((option for option in options if option in names), None)


def find_layer_names(names: Iterable[str], architecture: Architecture, total: int) -> LayerNames | None:
    """Finds how the tensors of a model's layers are named.

    Args:
        names: of all tensors in a checkpoint, which may be other ones than those of the model.
        architecture: of the model.
        total: the number of layers that there are names of, or more (those that predict further tokens come after).

    Returns:
        None if it cannot be said without doubt.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for number in NUMBER.finditer(name):
            prefix = name[: number.start() - 1]
            layers[prefix].add(int(number[0]))
            parts[prefix].add(name[number.end() + 1 :])
    expected = {name for layer in architecture.layers for name in _names_of(layer)}
    list_name = architecture.layer_prefix().rpartition(".")[2]
    scores = {
        prefix: len(parts[prefix] & expected)
        for prefix in layers
        if layers[prefix] >= set(range(total)) and not NUMBER.search(f".{prefix}.")
    }
    best = [prefix for prefix, score in scores.items() if score and score == max(scores.values())]
    best = best if len(best) < 2 else [prefix for prefix in best if prefix == architecture.layer_prefix()]
    if not best:  # all that layers consist of has other names in a file
        best = [prefix for prefix in scores if prefix.rpartition(".")[2] == list_name]
    return LayerNames(best[0]) if len(best) == 1 else None


def _names_of(layer: nn.Module) -> list[str]:
    return [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]]
