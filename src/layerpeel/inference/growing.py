"""Documents that a model is writing, in a batch that some leave and others join.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from layerpeel.inference.decoding import left_padded
from layerpeel.inference.kv_cache import joined, selected


@dataclass
class GrowingDocument:
    """A document, as far as it is written.

    Attributes:
        tokens: its token ids, those of its beginning first.
        uniforms: a random number for each of its tokens.
        ends: tokens that end a document.
        has_ended: whether it has an end, or as many tokens as it may have.
    """

    tokens: list[int]
    uniforms: numpy.ndarray
    ends: Collection[int]
    has_ended: bool = field(default=False, init=False)

    @property
    def room(self) -> int:
        """How many tokens more it may have."""
        return 0 if self.has_ended else len(self.uniforms) - len(self.tokens)

    def extend(self, new: Sequence[int]) -> None:
        """Takes over new tokens, up to the first that ends it, with it, as far as there is room."""
        for token in new[: self.room]:
            self.tokens.append(token)
            self.has_ended = token in self.ends or len(self.tokens) == len(self.uniforms)
            if self.has_ended:
                break


@dataclass
class GrowingBatch:
    """Documents that get their next tokens together.

    Attributes:
        input_ids, mask: [B, T], padded at the left.
        cache: of all tokens but the last; None where all have to be read (again).
    """

    documents: list[GrowingDocument]
    input_ids: Tensor
    mask: Tensor
    cache: Cache | None = None

    @classmethod
    def of(cls, documents: Sequence[GrowingDocument]) -> GrowingBatch:
        """A batch whose tokens have not been read yet."""
        return cls(list(documents), *left_padded([each.tokens for each in documents]))

    def extended(self, sequences: Tensor, cache: Cache | None) -> GrowingBatch:
        """The batch with new tokens: `sequences`, [B, T + new], and the cache of all of them but the last."""
        new = sequences[:, self.input_ids.shape[1] :]
        for document, tokens in zip(self.documents, new.tolist(), strict=True):
            document.extend(tokens)
        mask = functional.pad(self.mask, (0, new.shape[1]), value=1)
        return GrowingBatch(self.documents, sequences.cpu(), mask, cache)

    def without_ended(self) -> GrowingBatch:
        """The documents that go on, without padding that none of them needs."""
        left = [row for row, document in enumerate(self.documents) if not document.has_ended]
        documents = [self.documents[row] for row in left]
        if not documents or self.cache is None:
            return GrowingBatch(documents, self.input_ids[:0], self.mask[:0])
        drop = self.input_ids.shape[1] - max(len(document.tokens) for document in documents)
        cache = selected(self.cache, torch.tensor(left, device=_device_of(self.cache)), drop)
        return GrowingBatch(documents, self.input_ids[left, drop:], self.mask[left, drop:], cache)

    def joined(self, other: GrowingBatch) -> GrowingBatch:
        """The documents of both, whose tokens have been read."""
        assert self.cache is not None and other.cache is not None
        width = max(self.input_ids.shape[1], other.input_ids.shape[1])
        ids, masks = (
            torch.cat([functional.pad(part, (width - part.shape[1], 0)) for part in parts])
            for parts in ((self.input_ids, other.input_ids), (self.mask, other.mask))
        )
        return GrowingBatch(
            [*self.documents, *other.documents], ids, masks, joined([self.cache, other.cache], width - 1)
        )


def _device_of(cache: Cache) -> torch.device | None:
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    return keys.device if isinstance(keys, Tensor) else None
