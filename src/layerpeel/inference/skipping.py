"""Batches in which each row skips a layer (or none), in the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import first_tensor, replaced_forward


@contextmanager
def skipping_by_row(layerwise: LayerwiseModel, skipped: Sequence[int | None]) -> Iterator[None]:
    """Lets the model's own forward, and so its `generate`, serve several candidates in one batch.

    A skipped layer still runs on the rows that skip it, so that the KV cache keeps its shape; its output for them is
    replaced by its input.

    Args:
        skipped: for each row of the batch, the position that it skips, or None.
    """
    with ExitStack() as patches:
        for position in {layer for layer in skipped if layer is not None}:
            rows = [row for row, layer in enumerate(skipped) if layer == position]
            index = torch.tensor(rows, device=layerwise.device)
            patches.enter_context(_skip_rows(layerwise.layers[position], index))
        yield


def _skip_rows(layer: nn.Module, rows: Tensor) -> Any:
    run = layer.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = run(hidden, *args, **kwargs)
        changed = first_tensor(output).clone()
        changed[rows] = hidden[rows]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return replaced_forward(layer, forward)
