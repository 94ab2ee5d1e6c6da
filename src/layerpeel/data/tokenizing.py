"""Text to token ids, with one beginning-of-text token, whether the tokenizer sets it or the text has it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer sets before a text: usually beginning of text, or none; never those after it."""
    plain = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    ids = tokenizer.encode("a", verbose=False)
    return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(plain)] == plain), [])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text; see `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text after the tokenizer's start tokens, without the tokens that it sets after a text.

    A text that a chat template has rendered begins with the start tokens (as in `<s>[INST] ...`): it gets no others.
    """
    start = start_tokens(tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [text_ids if start and text_ids[: len(start)] == start else [*start, *text_ids] for text_ids in ids]
