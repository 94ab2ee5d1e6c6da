"""Text to token ids, as tasks need it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds, unless it begins with the first of them."""
    begun = text.startswith(tokenizer.decode([start_token(tokenizer)]))
    return tokenizer.encode(text, add_special_tokens=not begun)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of its continuation, split as lm-evaluation-harness does.

    Spaces that end the context go to the continuation, whose tokens are those of the whole after as many as the
    context has alone. An empty context (or one of spaces) becomes the tokenizer's beginning (or end) of text, unless
    the continuation begins with that.
    """
    kept = context.rstrip()
    if not kept:
        start = start_token(tokenizer)
        ids = tuple(tokenizer.encode(context + continuation, add_special_tokens=False))
        return (start,), ids[1:] if ids[:1] == (start,) else ids
    context, continuation = kept, context[len(kept) :] + continuation
    head = encode(tokenizer, context)
    return tuple(head), tuple(encode(tokenizer, context + continuation)[len(head) :])


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before the first token of a text."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
