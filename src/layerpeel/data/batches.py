"""Documents to rows of tokens, and rows to batches.

Documents that share a row are kept apart: a token attends to its own document only, and positions restart at 0 in each.
A model takes that from the positions (`positions_of`, `LayerwiseModel.runs_packed`).

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig, TextSource
from layerpeel.data.chats import write_chat
from layerpeel.data.documents import PlacedDocument, mix_documents
from layerpeel.data.rows import Rows, TokenRow
from layerpeel.data.token_documents import check_vocabulary
from layerpeel.data.tokenizing import start_tokens, with_start
from layerpeel.errors import InputError
from layerpeel.processes.progress import print_once

DOCUMENTS_PER_CALL = 512
# Rows that are filled at the same time: more of them leave less padding, and read further ahead.
OPEN_ROWS = 64


def load_rows(
    sources: Sequence[TextSource],
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
    ones are cut into several rows, so that all of a document is used. Unpacked rows hold one document each, or a piece
    of one, padded. No more is read than the rows asked for need
    (and `TextConfig.shuffle` documents of each source, and what fills `OPEN_ROWS`).

    Args:
        skip_rows: how many rows to leave out first. At its end the text starts again, in the same order, but no row is
            given twice. So, with the same seed, round n of rounds of k rows each gets new rows by `skip_rows=n * k`,
            until the text is used up.

    Raises:
        InputError: there is no text, or token ids are of another tokenizer.
    """
    for source in sources:
        if isinstance(source, TextConfig):
            check_vocabulary(Path(source.path), tokenizer)

    def read() -> Iterator[TokenRow]:
        documents = tokenize(mix_documents(sources, seed), tokenizer)
        if packing:
            return _packed(documents, sequence_length)
        return ([piece] for document in documents for piece in document.split(sequence_length))

    limit = None if max_tokens is None else max(1, max_tokens // sequence_length)
    rows = _from_row(read, skip_rows, limit)
    if not rows:
        raise InputError("no text: no source is given", hint="give at least one (distill.text)")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return Rows.of(rows, sequence_length, padding)


def tokenize(documents: Iterator[PlacedDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Token ids; texts with the tokenizer's beginning- and end-of-text tokens, chats with those of their template.

    What is token ids already stays as it is. Texts that a template has rendered already have some of these tokens, and
    get no second ones.
    """
    start, end = start_tokens(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    unknown, all_known = tokenizer.unk_token_id, True
    while chunk := list(islice(documents, DOCUMENTS_PER_CALL)):
        texts = [
            document if isinstance(document, str) else write_chat(document, tokenizer, where)
            for where, document in chunk
            if not isinstance(document, Tensor)
        ]
        token_ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for where, document in chunk:
            if isinstance(document, Tensor):
                yield document
                continue
            ids = next(token_ids)
            if all_known and unknown is not None and ids and 2 * ids.count(unknown) >= len(ids):
                all_known = False
                print_once(f"{where}: the tokenizer does not know at least half of this text (others are not named)")
            if isinstance(document, str):
                ids = with_start(ids, start) + (end if ids[-1:] != end else [])
            yield torch.tensor(ids, dtype=torch.int32)


def cycle_batches(
    rows: Rows, batch_size: int, *, seed: int, steps: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Batches `start` to `steps` of a process, the rows shuffled anew in each pass over them, the same for a seed.

    Batch i of process `rank` of `world` is batch `i * world + rank` of a single process. So an optimizer step sees the
    same rows on `world` processes that accumulate n batches each, and on one that accumulates `n * world`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for number in range(steps * world):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        if number % world == rank and number // world >= start:
            yield rows.take(order[:batch_size])
        order = order[batch_size:]


def _packed(documents: Iterator[Tensor], length: int) -> Iterator[TokenRow]:
    """Best fit: a document goes into the open row with the least room that holds it, or else into a new one.

    Rows are given in the order in which they were opened; otherwise the first would hold mostly long documents.
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
    """Rows `skip` to `skip + limit` of a text that starts again at its end, none of them twice."""
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
