"""Rows of tokens, and the positions and labels that keep the documents in a row apart.

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

TokenRow = list[Tensor]  # a row's documents, each [tokens] of int32: lists of ints would take nine times the memory


class Rows:
    """Rows of tokens, right-padded.

    Attributes:
        input_ids: [N, T] token ids.
        mask: [N, T] of bool, True at real tokens.
        document: [N, T], the number of each token's document in its row: 0, 1, 2, ...; padding has the last one's.
    """

    def __init__(self, input_ids: Tensor, mask: Tensor, document: Tensor | None = None) -> None:
        """One document a row, if `document` does not say otherwise."""
        self.input_ids, self.mask = input_ids, mask
        self.document = torch.zeros(1, 1).int().expand(input_ids.shape) if document is None else document

    @classmethod
    def of(cls, rows: Sequence[TokenRow], length: int, padding: int) -> Rows:
        """Rows of documents, padded to `length` tokens with the token id `padding`."""
        input_ids = torch.full((len(rows), length), padding, dtype=torch.int32)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        document = torch.zeros(len(rows), length, dtype=torch.int32)
        for index, row in enumerate(rows):
            start = 0
            for number, ids in enumerate(row):
                input_ids[index, start : start + len(ids)] = ids
                document[index, start:] = number
                start += len(ids)
            mask[index, :start] = True
        return cls(input_ids, mask, document)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, [N]."""
        return self.mask.sum(1)

    @property
    def tokens(self) -> int:
        """Real tokens of all rows."""
        return int(self.mask.sum())

    def digest(self) -> str:
        """A hash of all of them, in their order."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for value in (self.input_ids, self.mask, self.document.expand_as(self.input_ids)):
            digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def select(self, indices: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(self.input_ids[indices], self.mask[indices], self.document.expand_as(self.input_ids)[indices])

    def take(self, indices: Tensor, *, counts: bool = True) -> dict[str, Tensor]:
        """A batch of rows: `input_ids`, `attention_mask` and `document`, each [B, T] of int64.

        Args:
            counts: whether their tokens are real ones; else the mask says that all are padding.
        """
        return {
            "input_ids": self.input_ids[indices].long(),
            "attention_mask": self.mask[indices].long() * counts,
            "document": self.document[indices].long(),
        }

    def unpacked(self) -> Rows:
        """The same documents, one a row."""
        rows = [
            [ids[mask & (document == number)]]
            for ids, mask, document in zip(self.input_ids, self.mask, self.document, strict=True)
            for number in document.unique()
        ]
        return Rows.of(rows, self.input_ids.shape[1], 0)


def positions_of(document: Tensor | None) -> Tensor | None:
    """The position of each token in its document, from 0: it keeps the documents of a row apart.

    Models that build their masks from positions let no token attend across a place where they restart. Such a mask is
    dense, [B, T, T], which rules out kernels without one (flash attention's causal one); hence None where no row needs
    it.

    Args:
        document: [B, T], as in `Rows`.

    Returns:
        [B, T] of int64; None if no row holds more than one document.
    """
    if document is None or bool((document == document[:, :1]).all()):
        return None
    column = torch.arange(document.shape[1], device=document.device).expand_as(document)
    is_first = functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    return column - torch.where(is_first, column, 0).cummax(dim=1).values


def labels_within(document: Tensor, mask: Tensor) -> Tensor:
    """Where the next token is a real one of the same document, and so a label for cross-entropy.

    A distillation loss needs no such mask: it compares two distributions given the same context, also at the last
    token of a document.

    Args:
        document: [B, T], as in `Rows`.
        mask: [B, T] of bool, True at real tokens.

    Returns:
        [B, T] of bool; False at the last token of each row.
    """
    return functional.pad((document[:, 1:] == document[:, :-1]) & mask[:, 1:], (0, 1))
