"""Documents become rows: no token is lost, none comes twice, and rows are as full as they can be."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerpeel.config.distill import Packing
from layerpeel.data.packing import pack
from layerpeel.data.rows import Rows, labels_within, positions_of

DOCUMENTS = st.lists(st.integers(0, 30), max_size=200)
LENGTH = st.integers(2, 17)


def numbered(sizes: list[int]) -> list[Tensor]:
    """Documents of these sizes; every token of all of them is another."""
    return list(torch.arange(sum(sizes), dtype=torch.int32).split(sizes)) if sizes else []


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "none"])
@given(sizes=DOCUMENTS, length=LENGTH)
def test_no_token_is_lost_or_comes_twice(packing: Packing, sizes: list[int], length: int) -> None:
    rows = list(pack(iter(numbered(sizes)), length, packing))
    tokens = Counter(int(token) for row in rows for piece in row for token in piece)
    assert tokens == Counter(range(sum(sizes)))
    assert all(0 < sum(map(len, row)) <= length for row in rows)


@given(sizes=DOCUMENTS, length=LENGTH)
def test_wrapped_rows_are_the_joined_documents(sizes: list[int], length: int) -> None:
    rows = list(pack(iter(numbered(sizes)), length, "wrapped"))
    total = sum(sizes)
    assert [piece.tolist() for (piece,) in rows] == [
        list(range(start, min(start + length, total))) for start in range(0, total, length)
    ]


@given(sizes=DOCUMENTS, length=LENGTH)
def test_best_fit_keeps_documents_whole_that_fit(sizes: list[int], length: int) -> None:
    pieces = {tuple(piece.tolist()) for row in pack(iter(numbered(sizes)), length, "bfd") for piece in row}
    assert all(tuple(ids.tolist()) in pieces for ids in numbered(sizes) if 0 < len(ids) <= length)


def test_a_wrapped_row_is_one_document_to_the_model() -> None:
    rows = Rows.of(list(pack(iter(numbered([3, 9, 1, 2])), 5, "wrapped")), 5, 0)
    assert rows.mask.all() and rows.tokens == 15 and rows.lengths.tolist() == [5, 5, 5]
    assert positions_of(rows.document) is None  # so no dense mask is made
    assert labels_within(rows.document, rows.mask).int().tolist() == [[1, 1, 1, 1, 0]] * 3  # as in pretraining
