"""Documents from rows: plain text, chats or token ids, of one source or of a weighted mixture of several."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from layerpeel.config.fields import TextConfig, TextSource
from layerpeel.data.cells import TableRow, located, text_of
from layerpeel.data.chats import Messages, messages_of
from layerpeel.data.reading import read_rows
from layerpeel.data.token_documents import find_token_text, read_token_documents
from layerpeel.errors import InputError

Document = str | Messages | Tensor  # a text, a chat, or token ids, [tokens] of int32
PlacedDocument = tuple[str, Document]  # with how messages about it begin

TEXT, CHATS = "text", ("messages", "conversations")  # the default columns


def read_documents(source: TextConfig) -> Iterator[Document]:
    """The documents of one source, in the order of its rows; empty ones are left out, and those that it holds out.

    Raises:
        InputError: as in `read_rows`; a column is absent or holds something else; or there is no document at all.
    """
    return (document for _, document in _placed_documents(source))


def held_out_documents(source: TextConfig) -> Iterator[PlacedDocument]:
    """The documents that a source holds out, in the order of its rows.

    Raises:
        InputError: as `read_documents`.
    """
    return islice(_all_documents(source), 0, None, source.hold_out) if source.hold_out else iter(())


def mix_documents(sources: Sequence[TextSource], seed: int) -> Iterator[PlacedDocument]:
    """The documents of all sources, each with the place that it is from, until all are used up.

    Each next one is from a source drawn at random, by weight, among those that have not ended. So the first documents
    are a fair mixture too. The same seed gives the same order.
    """
    rng = random.Random(seed)
    pending = []
    for number, source in enumerate(sources):
        assert isinstance(source, TextConfig), "text from the teacher is read once it is written"
        shuffled = _shuffled(_placed_documents(source), source.shuffle, random.Random(f"{seed}/{number}"))
        pending.append((source, shuffled))
    while pending:
        (chosen,) = rng.choices(pending, [source.weight for source, _ in pending])
        document = next(chosen[1], None)
        if document is None:
            pending.remove(chosen)
        else:
            yield document


def _placed_documents(source: TextConfig) -> Iterator[PlacedDocument]:
    count = 0
    for number, document in enumerate(_all_documents(source)):
        if not source.hold_out or number % source.hold_out:
            count += 1
            yield document
    if source.hold_out and not count:
        raise InputError(
            f"{source.path}: it holds one document, and hold_out leaves that out",
            hint="give more documents (in a .txt file, a line <|endoftext|> ends one), or no hold_out",
        )


def _all_documents(source: TextConfig) -> Iterator[PlacedDocument]:
    if find_token_text(Path(source.path)):
        yield from ((source.path, document) for document in read_token_documents(Path(source.path)))
        return
    count = 0
    for row in read_rows(source.path, split=source.split, name=source.name, stream=True):
        chat = _chat_column(row, source)
        if row.get(chat or source.column, "") is None:  # tables have such rows
            continue
        document = messages_of(row, chat, source.path) if chat else text_of(row, source.column, source.path)
        if document if isinstance(document, list) else document.strip():
            count += 1
            yield located(row, source.path), document
    if not count:
        raise InputError(f"{source.path}: no text in it", hint="give a source with text in at least one row")


def _chat_column(row: TableRow, source: TextConfig) -> str | None:
    if source.messages is None and source.column == TEXT and TEXT not in row:
        return next((column for column in CHATS if column in row), None)
    return source.messages


def _shuffled(documents: Iterator[PlacedDocument], size: int, rng: random.Random) -> Iterator[PlacedDocument]:
    """Shuffles within a buffer of `size` documents, each drawn from it at random; keeps the order if `size` is 0."""
    buffer: list[PlacedDocument] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) > size:
            place = rng.randrange(len(buffer)) if size else 0
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
