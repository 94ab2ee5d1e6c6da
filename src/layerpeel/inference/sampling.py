"""Text sampled from a model: a batch of documents at a time, each by random numbers of its own.

The token at a place of a document is found by inverting the cumulative distribution at a uniform number that depends on
nothing but the seed, the document's number and the place (a counter-based generator: Salmon et al., SC 2011). So the
text is the same, up to rounding, whichever documents share a batch or a process. Nucleus sampling: Holtzman et al.,
arXiv 1904.09751.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from layerpeel.inference.budget import Budget
from layerpeel.inference.decoding import cache_argument, left_padded, plain_generation, selected, text_end_tokens
from layerpeel.inference.finite import refuse_nan
from layerpeel.inference.kv_cache import supports_prefill
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.interrupts import stop_if_asked

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed before the cumulative sum
# Documents that have ended leave a batch once they are this share of it; where a cache cannot be selected from, what
# the others hold is read again for that.
LEAVE, LEAVE_AND_READ = 0.25, 0.5


class Sampler:
    """Samples documents from a model, whatever its generation_config would change of its distribution.

    Args:
        length: tokens of a document, at most, its beginning included.
        temperature: divides the logits; above 0.
        top_p: the share of the probability whose tokens, the most probable ones, are drawn from.
        seed: of the random numbers.
        budget: of memory, for a batch.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        budget: Budget | None = None,
    ) -> None:
        self.layerwise, self.length, self.seed = layerwise, length, seed
        self.temperature, self.top_p = temperature, top_p
        self.budget = budget or Budget(None, layerwise.device)
        self.ends = text_end_tokens(layerwise.model, tokenizer)
        self._cache_argument = cache_argument(layerwise.model)
        self._leave = LEAVE if supports_prefill(layerwise.model.config, len(layerwise.layers)) else LEAVE_AND_READ

    def sample(
        self,
        beginnings: Sequence[Sequence[int]],
        numbers: Sequence[int],
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """Documents: each its beginning, and what the model writes after it up to an end of text or the length.

        Args:
            beginnings: token ids; none is empty, and none is as long as a document may be.
            numbers: of the documents; their random numbers depend on them.
            advance: called after each step, with the number of new tokens.

        Raises:
            NotFiniteError: the model gives NaN or infinity.
            RunError: memory does not suffice for a single document.
            Interrupted: a stop was asked for.
        """
        documents: dict[int, list[int]] = {}
        order = sorted(range(len(numbers)), key=lambda index: len(beginnings[index]))
        while left := [index for index in order if index not in documents]:
            batch = left[: max(1, self.budget.tokens(self.layerwise, 1) // self.length)]
            try:
                written = self._batch(
                    [beginnings[index] for index in batch], [numbers[index] for index in batch], advance
                )
            except Exception as error:
                self.budget.shrink(error, self.layerwise, 1, self.length)
            else:
                documents |= zip(batch, written, strict=True)
        return [documents[index] for index in range(len(numbers))]

    @torch.no_grad()
    def _batch(
        self, beginnings: Sequence[Sequence[int]], numbers: Sequence[int], advance: Callable[[int], None]
    ) -> list[list[int]]:
        """The documents of a batch, which get their tokens together."""
        documents = [list(tokens) for tokens in beginnings]
        uniforms = [uniform_numbers(self.seed, number, self.length) for number in numbers]
        rows, cache = list(range(len(documents))), None
        input_ids, mask = left_padded(documents)
        while rows:
            lengths = [len(documents[row]) for row in rows]
            steps = _Steps(self, lengths, [uniforms[row] for row in rows], advance)
            output = self._generate(input_ids, mask, cache, steps)
            for row, new in zip(rows, output.sequences[:, input_ids.shape[1] :].tolist(), strict=True):
                documents[row] = self._cut(documents[row], new)
            left = [index for index, row in enumerate(rows) if not self._has_ended(documents[row])]
            rows = [rows[index] for index in left]
            if not rows:
                break
            cache = selected(output.past_key_values, torch.tensor(left, device=self.layerwise.device))
            if cache is None:
                input_ids, mask = left_padded([documents[row] for row in rows])
            else:
                mask = functional.pad(mask, (0, output.sequences.shape[1] - mask.shape[1]), value=1)[left]
                input_ids = output.sequences[left].cpu()
        return documents

    def _has_ended(self, document: Sequence[int]) -> bool:
        """Whether a document with at least one new token is over."""
        return len(document) >= self.length or document[-1] in self.ends

    def _cut(self, document: list[int], new: Sequence[int]) -> list[int]:
        """The document with its new tokens, up to the first that ends it, with it, or to the length."""
        last = next((index for index, token in enumerate(new) if token in self.ends), len(new))
        return [*document, *new[: last + 1]][: self.length]

    def _generate(self, input_ids: Tensor, mask: Tensor, cache: Any, steps: _Steps) -> Any:
        """The output of `generate`, until enough documents have ended; `cache` is of those before, if there is one."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=int(steps.room.max()),
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.ends[0] if self.ends else 0,
            use_cache=True,
            return_dict_in_generate=True,
        )
        with plain_generation(self.layerwise.model):
            return self.layerwise.model.generate(
                input_ids.to(self.layerwise.device),
                attention_mask=mask.to(self.layerwise.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([refuse_nan, steps.choose]),
                stopping_criteria=StoppingCriteriaList([steps.stop]),
                **({} if cache is None else {self._cache_argument: cache}),
            )


class _Steps:
    """What happens at each step of a call of `generate`: tokens are drawn, and documents end.

    Args:
        lengths: of the documents so far.
        uniforms: of each document, a number for each of its tokens.
    """

    def __init__(
        self,
        sampler: Sampler,
        lengths: Sequence[int],
        uniforms: Sequence[numpy.ndarray],
        advance: Callable[[int], None],
    ) -> None:
        self.sampler, self.advance, self.count = sampler, advance, 0
        self.room = sampler.length - torch.tensor(lengths)
        self.ended = torch.zeros(len(lengths), dtype=torch.bool)
        self.uniforms = torch.zeros(len(lengths), int(self.room.max()), dtype=torch.float64)
        for row, (length, numbers) in enumerate(zip(lengths, uniforms, strict=True)):
            self.uniforms[row, : sampler.length - length] = torch.from_numpy(numbers[length:])
        self._ends = torch.tensor(sampler.ends)

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, [B, V], of which the highest is the token drawn."""
        probabilities = torch.softmax(scores / self.sampler.temperature, dim=-1)
        if self.sampler.top_p < 1:
            probabilities = nucleus(probabilities, self.sampler.top_p)
        tokens = invert(probabilities, self.uniforms[:, self.count])
        return scores.zero_().scatter_(1, tokens.to(scores.device)[:, None], 1.0)

    def stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether to stop, for all rows alike: once enough of the documents have ended."""
        stop_if_asked()
        self.advance(int((~self.ended).sum()))
        self.count += 1
        self.ended |= torch.isin(input_ids[:, -1].cpu(), self._ends) | (self.room <= self.count)
        enough = self.ended.float().mean() >= self.sampler._leave
        return torch.full((len(input_ids),), bool(enough), device=input_ids.device)


def uniform_numbers(seed: int, document: int, count: int) -> numpy.ndarray:
    """Numbers in [0, 1), one for each place of a document: the same for the same seed, document and place."""
    return numpy.random.Generator(numpy.random.Philox(key=[seed, document])).random(count)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities, [B, V], with 0 for those outside of the smallest set of the most probable that sums to `top_p`."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter_(1, tokens, outside), 0.0)


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens at which the cumulative distributions exceed the uniform numbers.

    Sums are over blocks of the vocabulary first, so that few are made in float64, in which a cumulative sum over it is
    exact enough for its last tokens.

    Args:
        probabilities: [B, V]; they need not sum to 1.
        uniforms: [B] of float64, in [0, 1), on the CPU.

    Returns:
        [B] of int64, on the CPU; of a probability above 0.
    """
    missing = -probabilities.shape[1] % BLOCK
    blocks = (functional.pad(probabilities, (0, missing)) if missing else probabilities).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).cpu().double()
    targets = uniforms * sums.sum(-1)
    block, before = _exceeding(sums, targets)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block.to(blocks.device)].cpu().double()
    return block * BLOCK + _exceeding(inside, targets - before)[0]


def _exceeding(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first index, [B], at which the cumulative sum of values, [B, N], exceeds a target; and the sum before it."""
    cumulative = values.cumsum(-1)
    below = torch.nextafter(cumulative[:, -1], torch.zeros(()).double())  # rounding may bring a target to the sum
    index = torch.searchsorted(cumulative, torch.minimum(targets, below).clamp_min(0.0)[:, None], right=True)[:, 0]
    before = (cumulative - values).gather(1, index[:, None])[:, 0]
    return index, before
