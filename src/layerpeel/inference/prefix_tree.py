"""Token sequences packed into rows in which shared prefixes are computed once.

A row is a tree of tokens in depth-first order: a token's descendants follow it without a break. So token b attends to
token a where a <= b < end[a]. Sequences that share a context, a few-shot prefix or just their first words share its
computation. A row that holds one sequence is the ordinary case.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeRow:
    """One tree of tokens.

    Attributes:
        tokens: token id of each node, in depth-first order.
        depths: position of each node in its sequence.
        ends: of each node, the first node after its descendants.
        paths: for each sequence in the row, its index and the nodes of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[tuple[int, list[int]]]


def pack(sequences: Sequence[Sequence[int]], width: int) -> Iterator[TreeRow]:
    """Packs sequences, sorted by their tokens, into rows of up to `width` nodes (or of one sequence that is longer)."""
    row = TreeRow([], [], [], [])
    last: Sequence[int] = ()
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[index]
        shared = _common_prefix(last, sequence)
        if row.paths and len(row.tokens) + len(sequence) - shared > width:
            yield _finished(row)
            row, shared = TreeRow([], [], [], []), 0
        path = row.paths[-1][1][:shared] if row.paths else []
        for depth in range(shared, len(sequence)):
            path.append(len(row.tokens))
            row.tokens.append(sequence[depth])
            row.depths.append(depth)
        row.paths.append((index, path))
        last = sequence
    if row.paths:
        yield _finished(row)


def single(sequences: Sequence[Sequence[int]]) -> Iterator[TreeRow]:
    """One sequence a row, longest first."""
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        length = len(sequences[index])
        yield TreeRow(list(sequences[index]), list(range(length)), [length] * length, [(index, list(range(length)))])


def pad_rows(rows: Sequence[TreeRow]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows as a batch.

    Returns:
        token ids [B, T], right-padded; positions [B, T] and attention mask [B, T, T] of bool. The last two are None
        where every row holds one sequence: plain causal attention gives the same.
    """
    width = max(len(row.tokens) for row in rows)
    input_ids = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows])
    if all(len(row.paths) == 1 for row in rows):
        return input_ids, None, None
    positions = torch.tensor([row.depths + [0] * (width - len(row.depths)) for row in rows])
    nodes = torch.arange(width)
    ends = torch.stack([torch.cat([torch.tensor(row.ends), nodes[len(row.ends) :] + 1]) for row in rows])
    attention_mask = (nodes[None, :] <= nodes[:, None]) & (nodes[:, None] < ends[:, None, :])
    return input_ids, positions, attention_mask


def _finished(row: TreeRow) -> TreeRow:
    """Fills in the ends: the nodes that follow a node and are deeper are its descendants."""
    open_nodes: list[int] = []
    for node, depth in enumerate(row.depths):
        while len(open_nodes) > depth:
            row.ends[open_nodes.pop()] = node
        open_nodes.append(node)
        row.ends.append(len(row.depths))
    return row


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
