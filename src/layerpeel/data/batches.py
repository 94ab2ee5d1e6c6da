"""Documents to rows of tokens, and rows to batches.

Documents that share a row are kept apart: a token attends to its own document only, and positions begin at 0 in each.
`positions_of` is all that a model needs for it (see `LayerwiseModel.runs_packed`).

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.data.documents import Document, mix_documents, write_chat
from layerpeel.data.rows import Rows, TokenRow
from layerpeel.errors import InputError

DOCUMENTS_PER_CALL = 512
# Rows that wait for documents that fit: more of them leave less room unused, and read further ahead.
OPEN_ROWS = 64


def load_rows(
    sources: Sequence[TextConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: bool = True,
    max_tokens: int | None = None,
    seed: int = 0,
    skip_rows: int = 0,
) -> Rows:
    """Reads, mixes and tokenises text to rows of `sequence_length`, up to `max_tokens` (at least one row).

    Packed rows hold several documents, each followed by the end-of-text token and whole if it fits into a row; longer
    ones are cut. Unpacked rows hold one document each, cut or padded. No more is read than the rows asked for need
    (and `TextConfig.shuffle` documents of each source, and what fills `OPEN_ROWS`).

    Args:
        skip_rows: how many rows to leave out first. Where the text ends it begins again, in the same order, and no
            row is given twice: round n of several that take k rows each takes other rows than the rounds before, with
            `skip_rows=n * k` and the same seed, until the text has been used up.

    Raises:
        InputError: there is no text.
    """

    def read() -> Iterator[TokenRow]:
        documents = _tokenized(mix_documents(sources, seed), tokenizer)
        if packing:
            return _packed(documents, sequence_length)
        return ([document[:sequence_length]] for document in documents)

    limit = None if max_tokens is None else max(1, max_tokens // sequence_length)
    rows = _from_row(read, skip_rows, limit)
    if not rows:
        raise InputError("no text: no source is given", hint="give at least one (distill.text)")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return Rows.of(rows, sequence_length, padding)


def cycle_batches(
    rows: Rows, batch_size: int, *, seed: int, steps: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Batches `start` to `steps` of a process, the rows shuffled anew in each pass over them, the same for a seed.

    With several processes, the batches that one would see are dealt in turn: batch i of process `rank` is batch
    `i * world + rank` of a single one. So `world` processes that accumulate a batches each see in an optimizer step the
    rows that a single one sees that accumulates `a * world`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for number in range(steps * world):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        if number % world == rank and number // world >= start:
            yield rows.take(order[:batch_size])
        order = order[batch_size:]


def _tokenized(documents: Iterator[tuple[str, Document]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Texts begin and end with the special tokens that the model expects there; chats are as their template says."""
    begin = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while some := list(islice(documents, DOCUMENTS_PER_CALL)):
        texts = [text if isinstance(text, str) else write_chat(text, tokenizer, where) for where, text in some]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (_, document), ids in zip(some, found, strict=True):
            yield torch.tensor([*begin, *ids, *end] if isinstance(document, str) else ids, dtype=torch.int32)


def _packed(documents: Iterator[Tensor], length: int) -> Iterator[TokenRow]:
    """Best fit: a document goes into the open row where it leaves least room, or else into a new one.

    Rows come in the order in which they were opened, so that the first of them are no choice of long documents.
    """
    rows: deque[TokenRow] = deque()
    room: deque[int] = deque()
    for piece in (piece for document in documents for piece in document.split(length)):
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


def _from_row(read: Callable[[], Iterator[TokenRow]], skip: int, limit: int | None) -> list[TokenRow]:
    """Rows `skip` to `skip + limit` of a text that begins again at its end, but none of them twice."""
    rows: list[TokenRow] = []
    total = 0
    for total, row in enumerate(read(), start=1):
        if total > skip:
            rows.append(row)
        if len(rows) == limit:
            return rows
    if total and skip >= total:
        return _from_row(read, skip % total, limit)
    return rows + list(islice(read(), min(skip, (limit or total) - len(rows))))
