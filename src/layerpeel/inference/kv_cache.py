"""Keys and values that a walk leaves behind, from which generation goes on without reading its prompts again.

Shapes: S streams, B batch, T tokens, R rows that write on, W tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class LayerKeyValues(NamedTuple):
    """Keys and values of a layer, [S * B, heads, T, width of a head]; `tokens` is B * T."""

    keys: Tensor
    values: Tensor
    tokens: int


class _KeyRecorder:
    """Stands in for a model's cache while a layer runs: keeps what the layer would store, and adds nothing to it."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._parts.append((keys, values))
        return keys, values

    def all_of(self, hidden: Tensor, batch: int) -> LayerKeyValues | None:
        """What was kept of a layer that gave `hidden`, [S * B, T, D]; None if it is not one key a token."""
        if not self._parts:
            return None
        keys, values = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if keys.dim() != 4 or (keys.shape[0], keys.shape[2]) != hidden.shape[:2]:
            return None
        return LayerKeyValues(keys, values, batch * hidden.shape[1])


@dataclass
class PrefillCache:
    """What the attention of each layer computed in a walk, on all streams.

    Attributes:
        candidates: positions that the streams after the first skip, ascending.
        layers: of each layer, as `LayerwiseModel.forward_with_skips` gives them.
        paths: for each sequence that was read, where its tokens are in the batch, flattened to [B * T].
    """

    candidates: Sequence[int]
    layers: list[LayerKeyValues | None] = field(default_factory=list)
    paths: Mapping[int, Tensor] = field(default_factory=dict)

    def cache_of(
        self, sequences: Sequence[int], streams: Sequence[int], lengths: Sequence[int], config: PretrainedConfig
    ) -> Cache | None:
        """The cache of rows that have been read but for their last token, left-padded; takes the place of these keys.

        A row that skips a layer has what the untouched stream had there and below, and its own above.

        Args:
            sequences, streams, lengths: [R], which sequence each row is of, on which stream, with how many tokens.

        Returns:
            a cache of W - 1 tokens; None where the family stores something else than all keys and values.
        """
        cache = DynamicCache(config=config)
        if not all(self.layers) or not is_plain(cache) or len(cache.layers) != len(self.layers):
            return None
        width = max(lengths)
        places = torch.zeros(len(lengths), width - 1, dtype=torch.long)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            places[row, width - length :] = self.paths[sequence][: length - 1]
        stream = torch.tensor(streams)
        skipped = torch.tensor([-1, *self.candidates])[stream]
        for position, layer in enumerate(self.layers):
            assert layer is not None
            own = torch.where(skipped < position, stream, 0)  # the stream's number there
            index = (own[:, None] * layer.tokens + places).to(layer.keys.device)
            keys, values = (kept.transpose(1, 2).flatten(0, 1)[index] for kept in (layer.keys, layer.values))
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), position)
            self.layers[position] = None
        return cache


def is_plain(cache: Cache | None) -> bool:
    """Whether a cache holds all keys and values of all layers, so that rows can be chosen from it."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
