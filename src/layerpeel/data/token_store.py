"""Text that is read and tokenised once: the documents of a mixture, in its order, on disk as token ids.

FOLDER/tokens-HASH/0.safetensors     its first documents (see `token_documents`)
                   4810.safetensors  those after 4,810 others
                   tokens.json       once the text has ended

The hash is of all that the documents depend on: what the sources hold and when their files were changed, their options,
the tokenizer, the seed. As each file is named by the number of documents before it, those that follow one another from
0 on are the beginning of the text, whichever process wrote them, and however it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig, TextSource
from layerpeel.data.digests import version_of_text
from layerpeel.data.token_documents import (
    MARKER,
    TokenText,
    find_token_text,
    read_documents_in,
    vocabulary_digest,
    write_documents,
)
from layerpeel.data.tokenizing import read_tokens, start_tokens
from layerpeel.errors import RunError
from layerpeel.processes.distributed import from_main
from layerpeel.processes.interrupts import stop_if_asked
from layerpeel.processes.progress import progress
from layerpeel.storage.files import json_digest, remove_folder, remove_paths

FORM = 1  # of the text; another one is written anew
SHARD = 2**22  # tokens of a file, about


class TokenStore:
    """Keeps the token ids of texts; the main process writes them, and all read them.

    Args:
        folder: for the folder of each text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[Path] = set()
        self._texts: dict[tuple[str, PreTrainedTokenizerBase, int], _Text | None] = {}  # in the main process

    def reader(
        self, sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, seed: int, tokens: int
    ) -> Callable[[], Iterator[Tensor]]:
        """What reads the documents of a mixture of sources, from the first on; every process has to call this.

        What is token ids already is not written again, nor is text of which nothing tells when it changes: a hub
        dataset whose commit is not known.

        Args:
            tokens: how many will be read, at most; as many are tokenised, as far as they are not there.

        Raises:
            InputError: there is no text, or the tokenizer cannot read it.
            Interrupted: a stop was asked for; what was tokenised is kept.
        """
        read = partial(read_tokens, sources, tokenizer, seed)

        def prepare() -> Path | None:
            key = repr(sources), tokenizer, seed
            if key not in self._texts:
                self._texts[key] = _open(self.folder, sources, tokenizer, seed)
            text = self._texts[key]
            if text and text.tokens < tokens and not text.has_ended:
                text.extend(read(text.documents), tokens)
            return text.folder if text else None

        folder = from_main(prepare)
        if folder is None:
            return read
        self._used.add(folder)
        return partial(_read, folder)

    def remove_unused(self) -> None:
        """Removes all texts but those that were asked for here; the main process does."""
        remove_paths(*(folder for folder in self.folder.glob("tokens-*") if folder not in self._used))

    def clear(self) -> None:
        """Removes all texts; the main process does."""
        self._used.clear()
        self._texts.clear()
        self.remove_unused()
        remove_folder(self.folder, ())


class _Text:
    """What is there of a text: how much, and in which files.

    Args:
        tokenizer: its tokenizer.
        made_by: what it depends on.

    Attributes:
        files: the checksum of each file, by its name, in their order.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, made_by: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.made_by = folder, tokenizer, made_by
        self.documents = self.tokens = 0
        self.files: dict[str, str] = {}
        for name, documents, checksum in _files(folder):
            self._add(name, documents, checksum)

    @property
    def has_ended(self) -> bool:
        """Whether there is no more of it."""
        marker = find_token_text(self.folder)
        return marker is not None and marker.documents == self.documents

    def extend(self, documents: Iterator[Tensor], tokens: int) -> None:
        """Writes what comes next, until there are so many tokens, or the text ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_paths(self.folder / MARKER)
        with progress("text to token ids", tokens - self.tokens) as advance:
            while self.tokens < tokens:
                before = self.tokens
                shard = _take(documents, min(SHARD, tokens - before))
                if not shard:
                    vocabulary = vocabulary_digest(self.tokenizer)
                    TokenText(self.documents, self.tokens, vocabulary, self.files, self.made_by).write(self.folder)
                    break
                name = _name(self.documents)
                self._add(name, shard, write_documents(self.folder / name, shard))
                advance(self.tokens - before)
                stop_if_asked()

    def _add(self, name: str, documents: Sequence[Tensor], checksum: str) -> None:
        self.documents += len(documents)
        self.tokens += sum(map(len, documents))
        self.files[name] = checksum


def _open(folder: Path, sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, seed: int) -> _Text | None:
    """A text in its folder; None if it is not to be kept."""
    files = [source for source in sources if isinstance(source, TextConfig)]
    if all(find_token_text(Path(source.path)) for source in files):
        return None
    versions = [version_of_text(source) for source in files]
    if None in versions:
        return None
    made_by = {
        "form": FORM,
        "content": versions,
        "sources": [source.model_dump(mode="json", exclude={"path"}) for source in files],
        "tokenizer": _digest_of(tokenizer),
        "seed": seed,
    }
    key = json_digest(made_by)
    return _Text(folder / f"tokens-{key}", tokenizer, made_by)


def _read(folder: Path) -> Iterator[Tensor]:
    """The documents of a text, each [tokens] of int32.

    Raises:
        RunError: it ends before its end.
    """
    count = 0
    for _, documents, _ in _files(folder):
        yield from documents
        count += len(documents)
    marker = find_token_text(folder)
    if not marker or marker.documents != count:
        raise RunError(
            f"{folder / _name(count)}: damaged or gone",
            hint="run the same command again: what is missing is written anew",
        )


def _files(folder: Path) -> Iterator[tuple[str, list[Tensor], str]]:
    """The files that follow one another from the first document on: name, documents, checksum."""
    count = 0
    while kept := read_documents_in(folder / _name(count)):
        yield _name(count), *kept
        count += len(kept[0])


def _name(before: int) -> str:
    """The name of the file that begins after so many documents."""
    return f"{before}.safetensors"


def _take(documents: Iterator[Tensor], tokens: int) -> list[Tensor]:
    """The next documents, until they hold so many tokens."""
    taken: list[Tensor] = []
    count = 0
    while count < tokens and (document := next(documents, None)) is not None:
        taken.append(document)
        count += len(document)
    return taken


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what makes token ids of a text or a chat."""
    start = start_tokens(tokenizer)  # it also takes off the truncation and the padding that a tokenizer came with
    inner = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else [type(tokenizer).__qualname__, vocabulary_digest(tokenizer), tokenizer.init_kwargs]
    )
    return json_digest([start, tokenizer.eos_token_id, tokenizer.chat_template, inner])
