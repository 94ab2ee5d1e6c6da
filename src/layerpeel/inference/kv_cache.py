"""Keys and values from a forward over whole sequences, with which generation continues without a prefill of its own.

Shapes: S branches, B batch, T tokens, R rows to continue, W tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class LayerKeyValues(NamedTuple):
    """Keys and values of a layer, [S * B, heads, T, width of a head]; `tokens` is B * T."""

    keys: Tensor
    values: Tensor
    tokens: int


class KeyValueRecorder:
    """Stands in for a model's KV cache while a layer runs: records what the layer would store, and returns it as is."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._parts.append((keys, values))
        return keys, values

    def recorded(self, hidden: Tensor, batch: int) -> LayerKeyValues | None:
        """The keys and values of a layer whose output is `hidden`, [S * B, T, D]; None if they are not one a token."""
        if not self._parts:
            return None
        keys, values = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if keys.dim() != 4 or (keys.shape[0], keys.shape[2]) != hidden.shape[:2]:
            return None
        return LayerKeyValues(keys, values, batch * hidden.shape[1])


def supports_prefill(config: PretrainedConfig, layers: int) -> bool:
    """Whether a cache for such a model is nothing but all keys and values of so many layers."""
    cache = DynamicCache(config=config)
    return is_plain(cache) and len(cache.layers) == layers


@dataclass
class PrefillCache:
    """Keys and values of every layer on all branches, from one `LayerwiseModel.forward_with_skips`.

    For models of which `supports_prefill` holds.

    Attributes:
        candidates: positions that the branches after the first skip, ascending.
        layers: of each layer; None for a layer that stores something else.
        paths: for each sequence in the batch, the indices of its tokens in the batch, flattened to [B * T].
    """

    candidates: Sequence[int]
    layers: list[LayerKeyValues | None] = field(default_factory=list)
    paths: Mapping[int, Tensor] = field(default_factory=dict)

    def cache_of(
        self, sequences: Sequence[int], branches: Sequence[int], lengths: Sequence[int], config: PretrainedConfig
    ) -> Cache | None:
        """A left-padded KV cache of rows without the last token of each; frees what it was made from.

        A row that skips a layer has the untouched branch's keys and values up to that layer, and its branch's above.

        Args:
            sequences, branches, lengths: [R], each row's sequence, its branch, and its number of tokens.

        Returns:
            a cache of W - 1 tokens; None where a layer stores something else than keys and values.
        """
        cache = DynamicCache(config=config)
        if not all(self.layers):
            return None
        width = max(lengths)
        tokens = torch.zeros(len(lengths), width - 1, dtype=torch.long)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            tokens[row, width - length :] = self.paths[sequence][: length - 1]
        branch_of_row = torch.tensor(branches)
        skipped = torch.tensor([-1, *self.candidates])[branch_of_row]
        for position, layer in enumerate(self.layers):
            assert layer is not None
            branch = torch.where(skipped < position, branch_of_row, 0)
            index = (branch[:, None] * layer.tokens + tokens).to(layer.keys.device)
            keys, values = (states.transpose(1, 2).flatten(0, 1)[index] for states in (layer.keys, layer.values))
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), position)
            self.layers[position] = None
        return cache


def is_plain(cache: Cache | None) -> bool:
    """Whether a cache holds all keys and values of all layers, so that rows can be selected from it."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def selected(cache: Cache | None, rows: Tensor, drop: int = 0) -> Cache | None:
    """The rows of a cache that continue; None, for a new prefill, where rows of a family's cache cannot be selected.

    Args:
        drop: tokens to leave out at the left, where all of these rows are padded.
    """
    if cache is None or not is_plain(cache):
        return None
    cache.batch_select_indices(rows)
    for layer in cache.layers if drop else ():
        layer.keys, layer.values = layer.keys[:, :, drop:], layer.values[:, :, drop:]
    return cache


def joined(caches: Sequence[Cache], tokens: int) -> Cache:
    """One plain cache of the rows of several, each padded at the left to so many tokens."""
    first, *others = caches
    for position, layer in enumerate(first.layers):
        rows = [layer, *(cache.layers[position] for cache in others)]
        for name in ("keys", "values"):
            states = [getattr(each, name) for each in rows]
            padded = [functional.pad(state, (0, 0, tokens - state.shape[2], 0)) for state in states]
            setattr(layer, name, torch.cat(padded))
    return first
