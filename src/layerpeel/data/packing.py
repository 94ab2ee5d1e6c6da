"""How documents become rows: joined and cut, by best fit, or one a row (`distill.packing`, by TRL's names)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from layerpeel.config.distill import Packing
from layerpeel.data.rows import TokenRow

# Rows that are filled at the same time: more of them leave less padding, and read further ahead.
OPEN_ROWS = 64


def pack(documents: Iterator[Tensor], length: int, packing: Packing) -> Iterator[TokenRow]:
    """Makes rows of at most `length` tokens; every token of every document is in one row, and in no other.

    Args:
        documents: the token ids of each, [tokens].
    """
    return PACKERS[packing]((document for document in documents if len(document)), length)


def _wrapped(documents: Iterator[Tensor], length: int) -> Iterator[TokenRow]:
    """Documents joined to one, and cut: all rows but the last are full. A row is one document to the model."""
    rest = torch.empty(0, dtype=torch.int32)
    for document in documents:
        *full, rest = torch.cat([rest, document]).split(length)
        yield from ([piece] for piece in full)
    if len(rest):
        yield [rest]


def _best_fit(documents: Iterator[Tensor], length: int) -> Iterator[TokenRow]:
    """A document goes into the open row with the least room that holds it, or else into a new one.

    Rows are given in the order in which they were opened; otherwise the first would hold mostly long documents.
    """
    rows: deque[TokenRow] = deque()
    room: deque[int] = deque()
    for (piece,) in _one_each(documents, length):
        size = len(piece)
        fits = [left for left in room if left >= size]
        if not fits:
            rows.append([])
            room.append(length)
        place = room.index(min(fits, default=length))
        rows[place].append(piece)
        room[place] -= size
        if len(rows) > OPEN_ROWS:
            room.popleft()
            yield rows.popleft()
    yield from rows


def _one_each(documents: Iterator[Tensor], length: int) -> Iterator[TokenRow]:
    """A row for each document, or for each piece of one that is longer than a row."""
    return ([piece] for document in documents for piece in document.split(length))


PACKERS: Mapping[Packing, Callable[[Iterator[Tensor], int], Iterator[TokenRow]]] = {
    "wrapped": _wrapped,
    "bfd": _best_fit,
    "none": _one_each,
}
