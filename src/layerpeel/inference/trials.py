"""What a model can do with its input beyond one text a row: tried out, as its family's code does not say.

Equal means: as near as the model's own noise, which is what it gives on the same texts by another kernel of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerpeel.model.forward_switches import attention_of
from layerpeel.model.layer_inputs import refuses_input
from layerpeel.processes.progress import print_once

if TYPE_CHECKING:
    from layerpeel.inference.layerwise import LayerwiseModel

# Shares of the hidden states' norm: what differs less is equal; what differs more never is, however noisy the model.
EQUAL = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
DIFFERENT = 0.1
NOISE = 3.0  # times the noise that was measured


def runs_trees(layerwise: LayerwiseModel) -> bool:
    """Whether prefix trees give what separate rows give; says so if not.

    Runs the model on two sequences that share a prefix, as rows, as rows with the mask written out, and as a tree.
    """
    ids = _few_tokens(layerwise)
    rows = torch.stack([ids[[0, 1, 2]], ids[[0, 1, 3]]])
    causal = torch.ones(2, 3, 3).tril().bool()
    tree_mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]).bool()
    same = False
    if takes_masks(layerwise):
        plain = _hidden(layerwise, rows)
        tree = _hidden(layerwise, ids[None], torch.tensor([[0, 1, 2, 2]]), tree_mask)
        if plain is not None and tree is not None:

            def masked_last() -> Tensor | None:
                hidden = _hidden(layerwise, rows, torch.arange(3).expand(2, 3), causal)
                return None if hidden is None else hidden[:, 2]

            same = _are_same(layerwise, tree[0, 2:], plain[:, 2], masked_last)
    if not same:
        print_once("texts that begin alike run one by one: in a tree, this model would give other numbers")
    return same


def runs_packed(layerwise: LayerwiseModel) -> bool:
    """Whether documents in a row stay apart when positions restart at 0 in each.

    Runs the model on two documents of two tokens: packed, each alone beside that, and each alone.
    """
    ids = _few_tokens(layerwise)
    alone = torch.stack([ids[[0, 1, 1, 1]], ids[[2, 3, 3, 3]]])
    positions = torch.arange(4).expand(2, 4)
    packed = _hidden(layerwise, torch.cat([ids[None], alone]), torch.cat([torch.tensor([[0, 1, 0, 1]]), positions]))
    if packed is None:
        return False
    expected = packed[1:, :2].flatten(0, 1)

    def unpacked() -> Tensor | None:
        hidden = _hidden(layerwise, alone, positions)
        return None if hidden is None else hidden[:, :2].flatten(0, 1)

    return _are_same(layerwise, packed[0], expected, unpacked)


def takes_masks(layerwise: LayerwiseModel) -> bool:
    """Whether the model's kernel of attention takes a mask for each token, [B, 1, T, T]; those of flash take none."""
    return not attention_of(layerwise.model.config).startswith("flash")


def _few_tokens(layerwise: LayerwiseModel) -> Tensor:
    return torch.arange(4) % layerwise.vocab_size


def _hidden(
    layerwise: LayerwiseModel, input_ids: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor | None:
    """Final hidden states [B, T, D] in fp32, or None if the model takes no such positions or mask."""
    try:
        return layerwise.forward_with_skips(input_ids, positions=positions, attention_mask=attention_mask)[0].float()
    except Exception as error:
        if not refuses_input(error):
            raise
        return None


def _are_same(layerwise: LayerwiseModel, hidden: Tensor, expected: Tensor, again: Callable[[], Tensor | None]) -> bool:
    """Whether hidden states are equal but for noise.

    Args:
        again: computes `expected` by another kernel; called where the difference is more than rounding.
    """
    difference = _difference(hidden, expected)
    if difference <= EQUAL.get(layerwise.model.dtype, EQUAL[torch.float32]):
        return True
    other = again() if difference <= DIFFERENT else None
    return other is not None and difference <= NOISE * _difference(other, expected)


def _difference(hidden: Tensor, expected: Tensor) -> float:
    """As a share of the norm of what is expected."""
    return float((hidden - expected).norm() / expected.norm().clamp_min(1e-30))
