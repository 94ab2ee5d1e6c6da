"""Text to token ids, with one beginning-of-text token, whether the tokenizer sets it or the text has it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from layerpeel.config.fields import TextSource
from layerpeel.data.chats import Messages, write_chat
from layerpeel.data.documents import PlacedDocument, mix_documents
from layerpeel.errors import InputError, reason_of
from layerpeel.processes.progress import print_once

DOCUMENTS_PER_CALL = 64
DOCUMENTS_FOR_MEAN, TOKENS_FOR_MEAN = 256, 2**19  # whichever is reached first
MOST_THREADS = 16  # that tokenise; more would wait for Python, which makes lists of what they give
USUAL_CHARACTERS = 6  # of a token at most; a text with more of them may have lost some

_Encode = Callable[[list[str]], list[list[int]]]  # texts to token ids, without special tokens
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


def mean_length(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens of a document of a source, the mean of some hundred."""
    lengths: list[int] = []
    for ids in islice(read_tokens([source], tokenizer, seed=0), DOCUMENTS_FOR_MEAN):
        lengths.append(len(ids))
        if sum(lengths) > TOKENS_FOR_MEAN:
            break
    return sum(lengths) / len(lengths)


def tokenize(documents: Iterator[PlacedDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Token ids; texts with the tokenizer's beginning- and end-of-text tokens, chats with those of their template.

    What is token ids already stays as it is. Texts that a template has rendered already have some of these tokens, and
    get no second ones. Other threads read and tokenise ahead, on all cores where the tokenizer can.
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
    """Chunks of documents with their texts and token ids; while one is used, other threads make the next.

    What is wrong with a document is raised where its chunk would be given, and so never if nobody reads so far.
    """
    encode, threads = _encoder(tokenizer)

    def read() -> list[PlacedDocument]:
        return list(islice(documents, DOCUMENTS_PER_CALL))

    def encoded(reading: Future[list[PlacedDocument]]) -> list[_Encoded]:
        if not (chunk := reading.result()):
            return []
        texts = [text if isinstance(text, str) else _written(text, tokenizer, where) for where, text in chunk]
        return list(zip(chunk, texts, _encode_all(texts, encode, chunk[0][0]), strict=True))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as encoders:
        coming = deque(encoders.submit(encoded, reader.submit(read)) for _ in range(threads))
        while chunk := coming.popleft().result():
            coming.append(encoders.submit(encoded, reader.submit(read)))
            yield chunk


def _encoder(tokenizer: PreTrainedTokenizerBase) -> tuple[_Encode, int]:
    """What encodes texts, and how many threads may do so at a time: all cores where the tokenizer is in Rust.

    That of the tokenizers library is asked itself, for transformers' call spends as long again on what is not read.
    """
    kind = type(tokenizer)
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
    if not plain:
        return lambda texts: list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]), 1
    tokenizer([""], add_special_tokens=False)  # undoes the truncation and padding of calls before
    backend = tokenizer.backend_tokenizer

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return encode, min(cores, MOST_THREADS)


def _written(document: Messages | Tensor, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A chat as its template writes it; nothing of what is token ids already."""
    return "" if isinstance(document, Tensor) else write_chat(document, tokenizer, where)


def _encode_all(texts: list[str], encode: _Encode, where: str) -> list[list[int]]:
    """The token ids of texts.

    Args:
        encode: from `_encoder`.
        where: how a message about the first of them begins.

    Raises:
        InputError: the tokenizer cannot read them.
    """
    try:
        return encode(texts)
    except Exception as error:  # of tokenizers' own, for words that a vocabulary without an unknown token lacks
        raise InputError(
            f"{where}: the tokenizer cannot read this text or one soon after it ({reason_of(error)})",
            hint="give it a token for the unknown (unk_token), or other text",
        ) from None


def _loses_text(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> bool:
    """Whether less than half of a text comes back from its tokens, white space aside."""
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return 2 * len("".join(back.split())) < len("".join(text.split()))
