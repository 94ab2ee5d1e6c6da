"""What the documents that a model writes begin with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TeacherTextConfig, TextConfig, TextSource
from layerpeel.data.chats import write_chat
from layerpeel.data.digests import digest_of_text
from layerpeel.data.documents import Document, mix_documents
from layerpeel.data.tokenizing import encode_text, read_tokens, start_tokens
from layerpeel.errors import InputError
from layerpeel.processes.progress import print_once

OPENING = 8  # tokens of a user's document that one of the model's begins with
MOST = 20_000  # prompts, or documents of the user, that are held in memory
ANSWERS = ("assistant", "tool")  # roles of messages that a prompt does not end with

TokenIds = tuple[int, ...]


class Beginnings:
    """The token ids that each document begins with, by its number; none is empty, or as long as a document may be.

    Args:
        source: says whether there are prompts.
        beside: the other sources of the text, whose documents lend their first tokens where that is needed.
        length: tokens of a document, at most.
        seed: of the order of prompts.

    Raises:
        InputError: there is nothing to begin with; or the prompts will not do.
    """

    def __init__(
        self,
        source: TeacherTextConfig,
        beside: Sequence[TextSource],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.prompts = source.prompts
        start = tuple(start_tokens(tokenizer) or _listed(tokenizer.bos_token_id))
        self.files = [] if start else [each for each in beside if isinstance(each, TextConfig)]
        self.fixed = start or tuple(_listed(tokenizer.eos_token_id))
        self._ids: list[TokenIds] | None = None

    def of(self, number: int) -> TokenIds:
        """Those of a document."""
        if self._ids is None:
            self._ids = self._read()
        return self._ids[number % len(self._ids)]

    @property
    def key(self) -> list[Any]:
        """What they depend on, but for seed and tokenizer."""
        sources = [self.prompts] if self.prompts else self.files
        fields = [source.model_dump(mode="json", exclude={"path"}) for source in sources]
        content = [digest_of_text(source) or source.path for source in sources]
        return [list(self.fixed), OPENING, fields, content]

    def _read(self) -> list[TokenIds]:
        if self.prompts:
            return self._prompts(self.prompts)
        if self.files:
            documents = read_tokens(self.files, self.tokenizer, self.seed)
            opened = [tuple(ids[:OPENING].tolist()) for ids in islice(documents, MOST)]
            fitting = [ids for ids in opened if 0 < len(ids) < self.length]
            end = self.tokenizer.eos_token_id
            unended = [ids for ids in fitting if ids[-1] != end] or [ids[:-1] for ids in fitting if len(ids) > 1]
            if unended:
                return unended
        if not self.fixed:
            raise InputError(
                "text from the teacher: its tokenizer has neither a beginning-of-text nor an end-of-text token",
                hint="say what documents begin with: {from: teacher, prompts: prompts.jsonl}; or name other sources "
                "beside it, from whose first tokens it goes on",
            )
        return [self.fixed]

    def _prompts(self, prompts: TextConfig) -> list[TokenIds]:
        placed = list(islice(mix_documents([prompts], self.seed), MOST))
        read = [tuple(self._prompt(document, where)) for where, document in placed]
        fitting = [ids for ids in read if 0 < len(ids) < self.length]
        if not fitting:
            raise InputError(
                f"{prompts.path}: each prompt has {self.length} tokens or more, and so no room for what comes after it",
                hint="raise distill.sequence_length, which is the length of a document, or give shorter prompts",
            )
        if len(fitting) < len(read):
            left = len(read) - len(fitting)
            print_once(f"{prompts.path}: {left} prompts are left out, which have {self.length} tokens or more")
        return fitting

    def _prompt(self, document: Document, where: str) -> list[int]:
        if isinstance(document, str):
            return encode_text(self.tokenizer, document)
        if not isinstance(document, list):
            return [int(token) for token in document]
        messages = document[: next((n for n in range(len(document), 0, -1) if not _answers(document[n - 1])), 0)]
        if not messages:
            raise InputError(
                f"{where}: a chat without a message that an assistant could answer",
                hint="a prompt ends with a message of the user; what the assistant says after it is left out",
            )
        text = write_chat(messages, self.tokenizer, where, to_go_on=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _answers(message: dict[str, Any]) -> bool:
    return message["role"] in ANSWERS


def _listed(token: int | None) -> list[int]:
    return [] if token is None else [token]
