"""Rows of one batch that each skip a layer of their own, in the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import (
    first_tensor,
    replaced_forward,
)


@contextmanager
def skipping_by_row(layerwise: LayerwiseModel, skipped: Sequence[int | None]) -> Iterator[None]:
    """Lets the model's own forward, and so its `generate`, serve several candidates in one batch.

    A skipped layer still runs on the rows that skip it, so that the KV cache keeps its shape; what it gives is put
    aside.

    Args:
        skipped: for each row of the batch, the position that it skips, or None.
    """
    with ExitStack() as patches:
        for position in {own for own in skipped if own is not None}:
            rows = torch.tensor([row for row, own in enumerate(skipped) if own == position], device=layerwise.device)
            patches.enter_context(_skip_rows(layerwise.layers[position], rows))
        yield


def _skip_rows(layer: nn.Module, rows: Tensor) -> Any:
    run = layer.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = run(hidden, *args, **kwargs)
        changed = first_tensor(output).clone()
        changed[rows] = hidden[rows]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return replaced_forward(layer, forward)
