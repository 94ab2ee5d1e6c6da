"""Text to token ids, as lm-evaluation-harness encodes it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from layerpeel.data.tokenizing import encode_text


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of its continuation, split as lm-evaluation-harness does.

    Trailing spaces of the context go to the continuation. The continuation's tokens are those of the concatenated
    text, less as many as the context has alone. An empty context (or one of spaces) becomes the tokenizer's
    beginning-of-text (or else end-of-text) token, unless the continuation begins with that.
    """
    stripped = context.rstrip()
    if not stripped:
        start = start_token(tokenizer)
        ids = tuple(tokenizer.encode(context + continuation, add_special_tokens=False))
        return (start,), ids[1:] if ids[:1] == (start,) else ids
    context, continuation = stripped, context[len(stripped) :] + continuation
    context_ids = encode_text(tokenizer, context)
    return tuple(context_ids), tuple(encode_text(tokenizer, context + continuation)[len(context_ids) :])


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before the first of a text: beginning of text, or else end of text, or else 0."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
