"""Greedy decoding of rows of which each skips a layer (or none).

The model's own `generate` decodes all rows in one loop, `STEP` tokens at a time; between, rows that have ended leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.inference.finite import NotFiniteError, refuse_nan
from layerpeel.inference.grouped_attention import grouped_queries
from layerpeel.inference.kv_cache import selected
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.skipping import skipping_by_row
from layerpeel.model.layer_inputs import CACHE_ARGUMENTS

STEP = 16  # tokens


class Decoder:
    """Decodes until a stop, the end of text, or a limit.

    Args:
        stops: text ends before the first of these.
        limit: new tokens, at most.
        options: of `generate`, that change the text.
        plain: whether an end of text of the model's generation_config is no part of the text, as the tokenizer's own
            is; if not, it is one unless the tokenizer has it as a special token.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        limit: int,
        options: Mapping[str, Any] | None = None,
        *,
        plain: bool = True,
    ) -> None:
        self.layerwise, self.tokenizer, self.stops, self.limit = layerwise, tokenizer, stops, limit
        self.options = dict(options or {})
        ends = text_end_tokens(layerwise.model, tokenizer)
        self.end_tokens = _end_tokens(tokenizer, stops, ends)
        self.text_ends = ends if plain else tuple(end for end in ends if end == tokenizer.eos_token_id)
        self._cache_argument = cache_argument(layerwise.model)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        skipped: Sequence[int | None],
        drafts: Sequence[Sequence[int]] | None = None,
        cache_of: Callable[[Sequence[int], Sequence[int]], Cache | None] = lambda rows, lengths: None,
    ) -> list[list[int]]:
        """The tokens after each prompt.

        Args:
            prompts: none is empty.
            skipped: for each, the position of the layer that is skipped, or None.
            drafts: the first new tokens of each prompt, where they are known.
            cache_of: gives a left-padded KV cache of some of the rows (their indices, and their numbers of tokens),
                without the last token of each; None to prefill them here.

        Raises:
            NotFiniteError: logits are NaN or infinite; its `request` is the index of the prompt.
        """
        written = [list(tokens) for tokens in drafts or [()] * len(prompts)]
        rows = [row for row, tokens in enumerate(written) if not self.has_ended(tokens)]
        if not rows:
            return written
        sequences = [[*prompts[row], *written[row]] for row in rows]
        input_ids, mask = left_padded(sequences, repeat_first=bool(self.options))
        cache = cache_of(rows, [len(sequence) for sequence in sequences])
        while rows:
            count = min(STEP, max(self.limit - len(written[row]) for row in rows))
            try:
                output = self._generate(input_ids, mask, cache, [skipped[row] for row in rows], count)
            except NotFiniteError as error:
                if error.request is not None:
                    error.tokens = error.tokens[int((mask[error.request] == 0).sum()) :]  # padding is on the left
                    error.request = rows[error.request]
                raise
            for row, new in zip(rows, output.sequences[:, input_ids.shape[1] :].tolist(), strict=True):
                written[row] = self._cut(written[row] + new)
            left = torch.tensor([index for index, row in enumerate(rows) if not self.has_ended(written[row])]).long()
            rows = [rows[index] for index in left.tolist()]
            input_ids = output.sequences[left.to(output.sequences.device)].cpu()
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)[left]
            cache = selected(output.past_key_values, left.to(self.layerwise.device)) if rows else None
        return written

    def has_ended(self, tokens: Sequence[int]) -> bool:
        """Whether these new tokens reach the limit or hold an end of text or a stop."""
        if len(tokens) >= self.limit or (tokens and tokens[-1] in self.end_tokens):
            return True
        return any(stop in self.tokenizer.decode(tokens, skip_special_tokens=True) for stop in self.stops)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, up to the end of text or the first stop."""
        end = next((index for index, token in enumerate(tokens) if token in self.text_ends), len(tokens))
        text = str(self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))
        for stop in self.stops:
            text = text.split(stop, 1)[0]
        return text

    def _cut(self, tokens: list[int]) -> list[int]:
        """Up to the first token that ends the text, with it, or to the limit."""
        last = next((index for index, token in enumerate(tokens) if token in self.end_tokens), len(tokens))
        return tokens[: min(last + 1, self.limit)]

    def _generate(
        self, input_ids: Tensor, mask: Tensor, cache: Cache | None, skipped: Sequence[int | None], count: int
    ) -> Any:
        """The output of `generate` for up to `count` more tokens; `cache` is of those before, if there is one."""
        ends = list(self.end_tokens)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            return_dict_in_generate=True,
            **self.options,
        )
        with skipping_by_row(self.layerwise, skipped), plain_generation(self.layerwise.model):
            return self.layerwise.model.generate(
                input_ids.to(self.layerwise.device),
                attention_mask=mask.to(self.layerwise.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([refuse_nan]),
                **({} if cache is None else {self._cache_argument: cache}),
            )


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which a model's forward takes a cache."""
    accepted = signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), "past_key_values")


def left_padded(sequences: Sequence[Sequence[int]], repeat_first: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] each.

    Args:
        repeat_first: pad with each sequence's first token, so that options that count its tokens see no other.
    """
    width = max(map(len, sequences))
    padding = [sequence[0] if repeat_first else 0 for sequence in sequences]
    input_ids = [[pad] * (width - len(tokens)) + list(tokens) for pad, tokens in zip(padding, sequences, strict=True)]
    mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in sequences]
    return torch.tensor(input_ids), torch.tensor(mask)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Lets `generate` do what its own arguments say, whatever the publisher's generation_config would fill in.

    That may hold repetition penalties, beams, forced or suppressed tokens, or a static cache.
    """
    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with grouped_queries():
            yield
    finally:
        model.generation_config = published


def text_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation_config (ends of a turn)."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(listed if isinstance(listed, list | tuple) else [listed])]
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))


_END_TOKENS: dict[tuple[int, int, tuple[str, ...], tuple[int, ...]], dict[int, None]] = {}


def _end_tokens(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], text_ends: tuple[int, ...]
) -> dict[int, None]:
    """Ends of text, and every token whose text holds a stop; a dict, for its order."""
    key = (id(tokenizer), len(tokenizer), tuple(stops), text_ends)
    if key not in _END_TOKENS:
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        with_stop = [index for index, text in enumerate(texts) if any(stop in text for stop in stops)]
        _END_TOKENS[key] = dict.fromkeys([*text_ends, *with_stop])
    return _END_TOKENS[key]
