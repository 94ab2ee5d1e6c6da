"""Documents to rows of tokens, and rows to batches.

Documents that share a row are kept apart, unless they are joined (`packing.py`): a token attends to its own document
only, and positions restart at 0 in each. A model takes that from the positions (`positions_of`,
`LayerwiseModel.runs_packed`).

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.distill import Packing
from layerpeel.config.fields import TextConfig, TextSource
from layerpeel.data.packing import OPEN_ROWS, pack
from layerpeel.data.rows import Rows, TokenRow
from layerpeel.data.token_documents import check_vocabulary
from layerpeel.data.token_store import TokenStore
from layerpeel.data.tokenizing import read_tokens
from layerpeel.errors import InputError

ROWS_AHEAD = OPEN_ROWS + 4  # that are read, at most, to know the rows that are asked for


def load_rows(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: Packing = "bfd",
    max_tokens: int | None = None,
    seed: int = 0,
    skip_tokens: int = 0,
    texts: TokenStore | None = None,
) -> Rows:
    """Reads, mixes and tokenises text to rows of `sequence_length`, until they hold `max_tokens` (or the text ends).

    No more is read than the rows asked for need (and `TextConfig.shuffle` documents of each source, and what fills
    `OPEN_ROWS`).

    Args:
        packing: how documents become rows, as `distill.packing` says; the model has to keep those of a row apart.
        max_tokens: real ones, padding does not count; the last row may exceed them.
        skip_tokens: how many real tokens to leave out first, in whole rows. At its end the text starts again, in the
            same order, but no row is given twice. So, with the same seed, each round gets new rows if it skips what
            the rounds before it were given, until the text is used up.
        texts: keeps the token ids, so that no text is read and tokenised twice; then every process has to call this.

    Raises:
        InputError: there is no text, or token ids are of another tokenizer.
    """
    for source in sources:
        if isinstance(source, TextConfig):
            check_vocabulary(Path(source.path), tokenizer)

    wanted = sys.maxsize if max_tokens is None else skip_tokens + max_tokens + ROWS_AHEAD * sequence_length
    read_documents = (
        texts.reader(sources, tokenizer, seed, wanted) if texts else partial(read_tokens, sources, tokenizer, seed)
    )

    def read() -> Iterator[TokenRow]:
        return pack(read_documents(), sequence_length, packing)

    rows = _from_token(read, skip_tokens, math.inf if max_tokens is None else max_tokens)
    if not rows:
        raise InputError("no text: no source is given", hint="give at least one (distill.text)")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return Rows.of(rows, sequence_length, padding)


def step_rows(rows: Rows, *, tokens: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The rows of each optimizer step, shuffled anew in each pass over them, the same for a seed.

    Each step takes as many rows as bring the count of real tokens so far nearest to its share of all, but at least
    one; so padding takes nothing of the tokens, and short rows make a step of many. Rows that hold more than
    `tokens` are all taken.

    Args:
        tokens: real ones, in all steps.

    Yields:
        indices of rows, [rows].
    """
    lengths, taken = rows.lengths.tolist(), 0
    tokens = max(tokens, rows.tokens)
    order = _shuffled(len(rows), seed)
    row = next(order)
    for step in range(1, steps + 1):
        chosen: list[int] = []
        while not chosen or 2 * (tokens * step // steps - taken) > lengths[row]:
            chosen.append(row)
            taken += lengths[row]
            row = next(order)
        yield torch.tensor(chosen)


def micro_batches(rows: Rows, chosen: Tensor, most: int, *, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
    """The micro-batches of a step that process `rank` of `world` runs, of at most `most` rows.

    All processes get the same number of them: under FSDP2 they have to run their layers together. One for which no
    row is left runs one of the step's with nothing in it that counts.

    Args:
        chosen: indices of the step's rows.
    """
    count = -(-len(chosen) // (most * world))
    return [
        rows.take(part) if len(part) else rows.take(chosen[:1], counts=False)
        for part in chosen[rank::world].tensor_split(count)
    ]


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """All numbers below `count` in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _from_token(read: Callable[[], Iterator[TokenRow]], skip: int, limit: float) -> list[TokenRow]:
    """The rows after `skip` tokens that hold `limit` of them, of a text that starts again at its end; none twice."""
    rows: list[TokenRow] = []
    given = 0
    for again in (False, True):
        total = 0
        for row in read():
            if (given >= limit and rows) or (again and total >= skip):
                return rows
            size = sum(map(len, row))
            if again or total >= skip:
                rows.append(row)
                given += size
            total += size
        if total and skip >= total:
            return _from_token(read, skip % total, limit)
    return rows
