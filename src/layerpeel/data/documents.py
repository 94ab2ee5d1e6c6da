"""Documents from rows: plain text or chats, of one source or of a weighted mixture of several."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.data.reading import TableRow, column_of, read_rows, text_of
from layerpeel.errors import InputError

Messages = list[dict[str, Any]]
Document = str | Messages  # a text, or a chat


TEXT, MESSAGES = "text", "messages"  # the default columns


def read_documents(source: TextConfig) -> Iterator[Document]:
    """The documents of one source, in the order of its rows; empty ones are left out.

    Raises:
        InputError: as in `read_rows`; a column is absent or holds something else; or there is no document at all.
    """
    count = 0
    for row in read_rows(source.path, split=source.split, name=source.name, stream=True):
        chat = _chat_column(row, source)
        if row.get(chat or source.column, "") is None:  # tables have such rows
            continue
        document = messages_of(row, chat, source.path) if chat else text_of(row, source.column, source.path)
        if document if isinstance(document, list) else document.strip():
            count += 1
            yield document
    if not count:
        raise InputError(f"{source.path}: no text in it", hint="give a source with text in at least one row")


def messages_of(row: TableRow, column: str, where: str) -> Messages:
    """A row's chat in a column.

    Raises:
        InputError: the column is absent, or holds something other than messages.
    """
    messages = column_of(row, column, where)
    if not isinstance(messages, list):
        raise InputError(
            f"{where}: column '{column}' holds {type(messages).__name__}, expected a list of messages",
            hint='a chat looks like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            keys = f"a mapping of {', '.join(map(str, message)) or 'nothing'}" if isinstance(message, dict) else ""
            raise InputError(
                f"{where}: column '{column}', message {number}: expected a role and a content, both text; "
                f"found {keys or type(message).__name__}",
                hint='a message looks like {"role": "user", "content": "..."}',
            )
    # Tables give every message all the keys that any message has, with None; templates expect them to be absent.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def write_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A chat as text, by the tokenizer's chat template, with its special tokens.

    Raises:
        InputError: there is no template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: it holds chats, and the tokenizer has no chat template to write them with",
            hint="give text in place of chats, or put the chat template of the model into the teacher's folder",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: the tokenizer's chat template refuses a chat of {roles} ({error})",
            hint="leave such chats out, or bring them to the form that the model was trained on",
        ) from None


def mix_documents(sources: Sequence[TextConfig], seed: int) -> Iterator[tuple[str, Document]]:
    """The documents of all sources, with the path of each, until all are used up.

    Each next one is from a source drawn at random, by weight, among those that have not ended. So the first documents
    are a fair mixture too. The same seed gives the same order.
    """
    rng = random.Random(seed)
    pending = [
        (source, _shuffled(read_documents(source), source.shuffle, random.Random(f"{seed}/{number}")))
        for number, source in enumerate(sources)
    ]
    while pending:
        (chosen,) = rng.choices(pending, [source.weight for source, _ in pending])
        document = next(chosen[1], None)
        if document is None:
            pending.remove(chosen)
        else:
            yield chosen[0].path, document


def _chat_column(row: TableRow, source: TextConfig) -> str | None:
    if source.messages is None and source.column == TEXT and TEXT not in row and MESSAGES in row:
        return MESSAGES
    return source.messages


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))


def _shuffled(documents: Iterator[Document], size: int, rng: random.Random) -> Iterator[Document]:
    """Shuffles within a buffer of `size` documents, each drawn from it at random; keeps the order if `size` is 0."""
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) > size:
            place = rng.randrange(len(buffer)) if size else 0
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
