"""Greedy text, for rows that each skip a layer of their own or none.

The model's own `generate` decodes all rows in one loop; between its steps, rows that have ended leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

from layerpeel.inference.kv_cache import is_plain
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.skipping import skipping_by_row
from layerpeel.model.layer_inputs import CACHE_ARGUMENTS

STEP = 16  # tokens, before rows that have ended are taken out


class Decoder:
    """Writes until a stop, the end of text, or a limit.

    Args:
        stops: text ends before the first of these.
        limit: tokens, at most.
    """

    def __init__(
        self, layerwise: LayerwiseModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], limit: int
    ) -> None:
        self.layerwise, self.tokenizer, self.stops, self.limit = layerwise, tokenizer, stops, limit
        self.end_tokens = _end_tokens(tokenizer, stops)
        accepted = signature(layerwise.model.forward).parameters
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in accepted), "past_key_values")

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        skipped: Sequence[int | None],
        begun: Sequence[Sequence[int]] | None = None,
        known: Callable[[Sequence[int], Sequence[int]], Cache | None] = lambda rows, lengths: None,
    ) -> list[list[int]]:
        """The tokens after each prompt.

        Args:
            prompts: none is empty.
            skipped: for each, the position of the layer that is skipped, or None.
            begun: what has been written of each.
            known: gives the cache of some of the rows (indices) with as many tokens, but for the last of each.
        """
        written = [list(tokens) for tokens in begun or [()] * len(prompts)]
        rows = [row for row, tokens in enumerate(written) if not self.has_ended(tokens)]
        if not rows:
            return written
        sequences = [[*prompts[row], *written[row]] for row in rows]
        input_ids, mask = _left_padded(sequences)
        cache = known(rows, [len(own) for own in sequences])
        while rows:
            count = min(STEP, max(self.limit - len(written[row]) for row in rows))
            output = self._generate(input_ids, mask, cache, [skipped[row] for row in rows], count)
            for row, new in zip(rows, output.sequences[:, input_ids.shape[1] :].tolist(), strict=True):
                written[row] = self._cut(written[row] + new)
            left = torch.tensor([index for index, row in enumerate(rows) if not self.has_ended(written[row])]).long()
            rows = [rows[index] for index in left.tolist()]
            input_ids = output.sequences[left.to(output.sequences.device)].cpu()
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)[left]
            cache = _selected(output.past_key_values, left.to(self.layerwise.device)) if rows else None
        return written

    def has_ended(self, tokens: Sequence[int]) -> bool:
        """Whether nothing that follows would be read."""
        if len(tokens) >= self.limit or (tokens and tokens[-1] in self.end_tokens):
            return True
        return any(stop in self.tokenizer.decode(tokens, skip_special_tokens=True) for stop in self.stops)

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say, up to the first stop."""
        end = self.tokenizer.eos_token_id
        own = list(tokens[: tokens.index(end)] if end in tokens else tokens)
        text = str(self.tokenizer.decode(own, skip_special_tokens=True))
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
        """What `generate` gives for `count` more tokens, of which `cache` holds what is known of those before."""
        ends = list(self.end_tokens)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            return_dict_in_generate=True,
        )
        with skipping_by_row(self.layerwise, skipped):
            return self.layerwise.model.generate(
                input_ids.to(self.layerwise.device),
                attention_mask=mask.to(self.layerwise.device),
                generation_config=config,
                **({} if cache is None else {self._cache_argument: cache}),
            )


def _left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and where the real ones are, [B, T]."""
    width = max(map(len, sequences))
    input_ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in sequences])
    return input_ids, torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in sequences])


def _selected(cache: Cache | None, rows: Tensor) -> Cache | None:
    """The rows of a cache that go on; None, and all is read anew, where a family's cache cannot be cut."""
    if cache is None or not is_plain(cache):
        return None
    cache.batch_select_indices(rows)
    return cache


_END_TOKENS: dict[tuple[int, int, tuple[str, ...]], dict[int, None]] = {}


def _end_tokens(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> dict[int, None]:
    """End of text, and every token that holds a stop: nothing after it would be read."""
    key = (id(tokenizer), len(tokenizer), tuple(stops))
    if key not in _END_TOKENS:
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        held = [index for index, text in enumerate(texts) if any(stop in text for stop in stops)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        _END_TOKENS[key] = dict.fromkeys(end + held or [0])
    return _END_TOKENS[key]
