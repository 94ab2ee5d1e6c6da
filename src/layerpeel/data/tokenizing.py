"""Text to token ids, with one beginning-of-text token, whether the tokenizer sets it or the text has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TextSource
from layerpeel.data.chats import Messages, write_chat
from layerpeel.data.documents import PlacedDocument, mix_documents
from layerpeel.errors import InputError, reason_of
from layerpeel.processes.progress import print_once

DOCUMENTS_PER_CALL = 512
USUAL_CHARACTERS = 6  # of a token at most; a text with more of them may have lost some

_Encoded = tuple[PlacedDocument, str, list[int]]  # a document, its text, and the token ids of that


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer sets before a text: usually beginning of text, or none; never those after it."""
    try:
        plain = tokenizer.encode("a", add_special_tokens=False, verbose=False)
        ids = tokenizer.encode("a", verbose=False)
    except Exception:  # of tokenizers' own, where a vocabulary has neither this letter nor an unknown token
        plain = ids = []
    places = [at for at in range(len(ids)) if plain and ids[at : at + len(plain)] == plain]
    if places:
        return ids[: places[0]]
    return [token for token in tokenizer.encode("", verbose=False)[:1] if token == tokenizer.bos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text after the tokenizer's start tokens, without the tokens that it sets after a text."""
    return with_start(tokenizer.encode(text, add_special_tokens=False, verbose=False), start_tokens(tokenizer))


def with_start(ids: list[int], start: list[int]) -> list[int]:
    """The ids of a text after the start tokens.

    A text that a chat template has rendered begins with them already (as in `<s>[INST] ...`), and gets no others.
    """
    return ids if ids[: len(start)] == start else [*start, *ids]


def read_tokens(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, seed: int, skip: int = 0
) -> Iterator[Tensor]:
    """The token ids of each document of a mixture of sources, but for the first `skip`."""
    return tokenize(islice(mix_documents(sources, seed), skip, None), tokenizer)


def tokenize(documents: Iterator[PlacedDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Token ids; texts with the tokenizer's beginning- and end-of-text tokens, chats with those of their template.

    What is token ids already stays as it is. Texts that a template has rendered already have some of these tokens, and
    get no second ones. Another thread reads and tokenises ahead, by all cores where the tokenizer can.
    """
    start, end = start_tokens(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    unknown, all_known = tokenizer.unk_token_id, True
    for chunk in _ahead(documents, tokenizer):
        for at, ((where, document), text, ids) in enumerate(chunk):
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
            yield torch.from_numpy(np.array(ids, dtype=np.int32))  # several times faster than of a list


def _ahead(documents: Iterator[PlacedDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[_Encoded]]:
    """Chunks of documents with their texts and token ids; while one is used, another thread makes the next.

    What is wrong with a document is raised where its chunk would be given, and so never if nobody reads so far.
    """

    def encode_next() -> list[_Encoded]:
        chunk = list(islice(documents, DOCUMENTS_PER_CALL))
        texts = [text if isinstance(text, str) else _written(text, tokenizer, where) for where, text in chunk]
        return list(zip(chunk, texts, _encode(texts, tokenizer, chunk[0][0]) if chunk else [], strict=True))

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(encode_next)
        while encoded := coming.result():
            coming = thread.submit(encode_next)
            yield encoded


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
