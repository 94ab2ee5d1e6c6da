"""Documents that are token ids already, as the teacher wrote them: a folder of safetensors files, and what they are.

FOLDER/00000.safetensors   documents in order: `tokens`, all of them joined, and `lengths`, both int32
       tokens.json           once it is complete: how many documents count, the files' checksums, and of what tokenizer

A folder without tokens.json is not complete, and is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.errors import InputError, RunError
from layerpeel.storage.files import json_digest, write_whole

MARKER = "tokens.json"


@dataclass(frozen=True)
class TokenText:
    """What a complete folder of token ids says of itself.

    Attributes:
        documents: how many there are; those after them in the last file do not count.
        tokens: how many they have in all.
        tokenizer: a digest of the vocabulary whose ids they are.
        files: the checksum of each file, by its name, in their order.
        made_by: what they were made by.
    """

    documents: int
    tokens: int
    tokenizer: str
    files: dict[str, str]
    made_by: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Completes the folder; the main process does."""
        write_whole(folder / MARKER, json.dumps(asdict(self), ensure_ascii=False, indent=1))


def find_token_text(folder: Path) -> TokenText | None:
    """What a folder says of itself; None if it is no complete folder of token ids."""
    try:
        value = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return TokenText(**value)
    except (OSError, ValueError, TypeError):
        return None


def token_text_digest(folder: Path) -> str | None:
    """A hash of the documents of a complete folder of token ids; None if it is none."""
    text = find_token_text(folder)
    if not text:
        return None
    return hashlib.sha256(repr([text.documents, *text.files.values()]).encode()).hexdigest()[:16]


def write_documents(path: Path, documents: Sequence[Sequence[int] | Tensor]) -> str:
    """Writes a file of documents; each process that calls this does. Gives its checksum."""
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int32)
    tokens = torch.cat([torch.as_tensor(document, dtype=torch.int32) for document in documents])
    checksum = _checksum(tokens, lengths)
    write_whole(path, save({"tokens": tokens, "lengths": lengths}, {"sha256": checksum}), each_process=True)
    return checksum


def read_documents_in(path: Path) -> tuple[list[Tensor], str] | None:
    """The documents of a file, mapped into memory, and its checksum; None if it is gone, or not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
            checksum = (file.metadata() or {}).get("sha256", "")
    except (OSError, SafetensorError):
        return None
    if checksum != _checksum(tokens, lengths):
        return None
    return list(tokens.split(lengths.tolist())), checksum


def read_token_documents(folder: Path) -> Iterator[Tensor]:
    """The documents of a complete folder, each [tokens] of int32.

    Raises:
        RunError: a file is gone, or not as it was written.
    """
    text = find_token_text(folder)
    assert text

    def read_all() -> Iterator[Tensor]:
        for name, checksum in text.files.items():
            documents = read_documents_in(folder / Path(name).name)
            if documents is None or documents[1] != checksum:
                raise RunError(
                    f"{folder / name}: damaged or gone",
                    hint=f"remove {folder / MARKER} and run the same command again: what is missing is written anew",
                )
            yield from documents[0]

    yield from islice(read_all(), text.documents)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary."""
    return json_digest(sorted(tokenizer.get_vocab().items()))


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the ids in a folder are those of a tokenizer, if it holds token ids.

    Raises:
        InputError: they are of another.
    """
    text = find_token_text(folder)
    if text and text.tokenizer != vocabulary_digest(tokenizer):
        raise InputError(
            f"{folder}: its token ids are of another tokenizer than the teacher's",
            hint="name the text that they were made from, or let this teacher write text: {from: teacher}",
        )


def _checksum(tokens: Tensor, lengths: Tensor) -> str:
    digest = hashlib.sha256(lengths.numpy().tobytes())
    digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()
