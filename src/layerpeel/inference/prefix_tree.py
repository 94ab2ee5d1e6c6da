"""Token sequences packed into rows in which what several of them begin with stands once.

A row is a tree of tokens in depth-first order: each token's children, and all below them, follow it without a break.
So "does token b see token a" is "a <= b < end[a]", and sequences that share a context, a few-shot prefix or just
their first words share its computation. A row that holds one sequence is the ordinary case.

Shapes: B rows, T tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tree.

    Attributes:
        tokens, depths, ends: of each node, in depth-first order: its token, its place in its sequence, and the first
            node after all that follow from it.
        paths: for each sequence in the row, its index and the nodes of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[tuple[int, list[int]]]


def pack(sequences: Sequence[Sequence[int]], width: int) -> Iterator[Row]:
    """Packs sequences, in the order of their tokens, into rows of up to `width` nodes (or one sequence, if longer)."""
    row, last = Row([], [], [], []), ()  # type: tuple[Row, Sequence[int]]
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[index]
        shared = _common_prefix(last, sequence)
        if row.paths and len(row.tokens) + len(sequence) - shared > width:
            yield _finished(row)
            row, shared = Row([], [], [], []), 0
        path = row.paths[-1][1][:shared] if row.paths else []
        for depth in range(shared, len(sequence)):
            path.append(len(row.tokens))
            row.tokens.append(sequence[depth])
            row.depths.append(depth)
        row.paths.append((index, path))
        last = sequence
    if row.paths:
        yield _finished(row)


def single(sequences: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Each sequence in a row of its own, longest first."""
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        length = len(sequences[index])
        yield Row(list(sequences[index]), list(range(length)), [length] * length, [(index, list(range(length)))])


def pad_rows(rows: Sequence[Row]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows as a batch.

    Returns:
        token ids [B, T]; positions [B, T] and what each token sees, [B, T, T] of bool: both None where no row
        branches, so that plain causal attention over right-padded rows is the same.
    """
    width = max(len(row.tokens) for row in rows)
    input_ids = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows])
    if all(len(row.paths) == 1 for row in rows):
        return input_ids, None, None
    positions = torch.tensor([row.depths + [0] * (width - len(row.depths)) for row in rows])
    place = torch.arange(width)
    ends = torch.stack([torch.cat([torch.tensor(row.ends), place[len(row.ends) :] + 1]) for row in rows])
    attention_mask = (place[None, :] <= place[:, None]) & (place[:, None] < ends[:, None, :])
    return input_ids, positions, attention_mask


def _finished(row: Row) -> Row:
    """The ends follow from the depths: what comes after a node and lies deeper belongs to it."""
    open_nodes: list[int] = []
    for node, depth in enumerate(row.depths):
        while len(open_nodes) > depth:
            row.ends[open_nodes.pop()] = node
        open_nodes.append(node)
        row.ends.append(len(row.depths))
    return row


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
