"""Text to token ids, with one beginning-of-text token, whether the tokenizer sets it or the text has it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer sets before a text: usually beginning of text, or none; never those after it."""
    plain = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    ids = tokenizer.encode("a", verbose=False)
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
