"""Greedy text, for rows that each skip a layer of their own or none.

The model's own `generate` decodes all rows in one loop; between its steps, rows that have ended leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerpeel.stack import Stack, skipping_by_row

FIRST_STEP = 16  # tokens, before rows that have ended are first taken out; then twice as many each time


class Decoder:
    """Writes until a stop, the end of text, or a limit.

    Args:
        stops: text ends before the first of these.
        limit: tokens, at most.
    """

    def __init__(self, stack: Stack, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], limit: int) -> None:
        self.stack, self.tokenizer, self.stops, self.limit = stack, tokenizer, stops, limit
        self.end_tokens = _end_tokens(tokenizer, stops)

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        skipped: Sequence[int | None],
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """The tokens after each prompt.

        Args:
            prompts: none is empty.
            skipped: for each, the position of the layer that is skipped, or None.
            begun: what has been written of each.
        """
        written = [list(tokens) for tokens in begun or [()] * len(prompts)]
        step = FIRST_STEP
        while rows := [row for row, tokens in enumerate(written) if not self.has_ended(tokens)]:
            sequences = [[*prompts[row], *written[row]] for row in rows]
            count = min(step, max(self.limit - len(written[row]) for row in rows))
            for row, new in zip(rows, self._generate(sequences, [skipped[row] for row in rows], count), strict=True):
                written[row] = self._cut(written[row] + new)
            step *= 2
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
        self, sequences: Sequence[Sequence[int]], skipped: Sequence[int | None], count: int
    ) -> list[list[int]]:
        width = max(map(len, sequences))
        input_ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in sequences])
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in sequences])
        ends = list(self.end_tokens)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
        )
        with skipping_by_row(self.stack, skipped):
            output = self.stack.model.generate(
                input_ids.to(self.stack.device), attention_mask=mask.to(self.stack.device), generation_config=config
            )
        new: list[list[int]] = output[:, width:].tolist()
        return new


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
