"""Documents to rows of tokens, and rows to batches.

Documents that share a row are kept apart, unless they are joined (`packing.py`): a token attends to its own document
only, and positions restart at 0 in each. A model takes that from the positions (`positions_of`,
`LayerwiseModel.runs_packed`).

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.distill import Packing
from layerpeel.config.fields import TextConfig, TextSource
from layerpeel.data.chats import Messages, write_chat
from layerpeel.data.documents import PlacedDocument, mix_documents
from layerpeel.data.packing import pack
from layerpeel.data.rows import Rows, TokenRow
from layerpeel.data.token_documents import check_vocabulary
from layerpeel.data.tokenizing import start_tokens, with_start
from layerpeel.errors import InputError, reason_of
from layerpeel.processes.progress import print_once

DOCUMENTS_PER_CALL = 512
USUAL_CHARACTERS = 6  # of a token at most; a text with more of them may have lost some


def load_rows(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: Packing = "bfd",
    max_tokens: int | None = None,
    seed: int = 0,
    skip_tokens: int = 0,
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

    Raises:
        InputError: there is no text, or token ids are of another tokenizer.
    """
    for source in sources:
        if isinstance(source, TextConfig):
            check_vocabulary(Path(source.path), tokenizer)

    def read() -> Iterator[TokenRow]:
        return pack(tokenize(mix_documents(sources, seed), tokenizer), sequence_length, packing)

    rows = _from_token(read, skip_tokens, math.inf if max_tokens is None else max_tokens)
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
        texts = [text if isinstance(text, str) else _written(text, tokenizer, where) for where, text in chunk]
        token_ids = _encode(texts, tokenizer, chunk[0][0])
        for at, ((where, document), text, ids) in enumerate(zip(chunk, texts, token_ids, strict=True)):
            if isinstance(document, Tensor):
                yield document
                continue
            if all_known and unknown is not None and ids and 2 * ids.count(unknown) >= len(ids):
                all_known = False
                print_once(f"{where}: the tokenizer does not know at least half of this text (others are not named)")
            is_tried = at == 0 or len(text) > USUAL_CHARACTERS * len(ids)
            if all_known and unknown is None and is_tried and _loses_text(tokenizer, text, ids):
                all_known = False
                print_once(f"{where}: the tokenizer drops at least half of this text (others are not named)")
            if isinstance(document, str):
                ids = with_start(ids, start) + (end if ids[-1:] != end else [])
            yield torch.tensor(ids, dtype=torch.int32)


def _written(document: Messages | Tensor, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A chat as its template writes it; nothing of what is token ids already."""
    return "" if isinstance(document, Tensor) else write_chat(document, tokenizer, where)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, where: str) -> list[list[int]]:
    """The token ids of texts, without special tokens.

    Args:
        where: how a message about the first of them begins.

    Raises:
        InputError: the tokenizer cannot read them.
    """
    try:
        token_ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # of tokenizers' own, for words that a vocabulary without an unknown token lacks
        raise InputError(
            f"{where}: the tokenizer cannot read this text or one soon after it ({reason_of(error)})",
            hint="give it a token for the unknown (unk_token), or other text",
        ) from None
    return token_ids


def _loses_text(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> bool:
    """Whether less than half of a text comes back from its tokens, white space aside."""
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return 2 * len("".join(back.split())) < len("".join(text.split()))


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
