"""Text sampled from a model: a batch of documents at a time, each by random numbers of its own.

The token at a place of a document is found by inverting the cumulative distribution at a uniform number that depends on
nothing but the seed, the document's number and the place (a counter-based generator: Salmon et al., SC 2011). So the
text is the same, up to rounding, whichever documents share a batch or a process. Nucleus sampling: Holtzman et al.,
arXiv 1904.09751.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from layerpeel.inference.budget import Budget
from layerpeel.inference.decoding import cache_argument, plain_generation, text_end_tokens
from layerpeel.inference.finite import refuse_nan
from layerpeel.inference.growing import GrowingBatch, GrowingDocument
from layerpeel.inference.kv_cache import supports_prefill
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.interrupts import stop_if_asked

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed before the cumulative sum
# Documents that have ended leave a batch once they are this share of it; where rows of a cache cannot be selected, the
# others are read again for that.
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
        self.selectable = supports_prefill(layerwise.model.config, len(layerwise.layers))
        self._cache_argument = cache_argument(layerwise.model)

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
        documents = [
            GrowingDocument(list(beginning), uniform_numbers(self.seed, number, self.length), self.ends)
            for beginning, number in zip(beginnings, numbers, strict=True)
        ]
        while left := [document for document in documents if not document.has_ended]:
            try:
                self._write(sorted(left, key=lambda document: len(document.tokens)), advance)
            except Exception as error:
                self.budget.shrink(error, self.layerwise, 1, self.length)
        return [document.tokens for document in documents]

    @torch.no_grad()
    def _write(self, documents: Sequence[GrowingDocument], advance: Callable[[int], None]) -> None:
        """Writes documents to their ends; where some leave the batch, others take their places."""
        most = max(1, self.budget.tokens(self.layerwise, 1) // self.length)
        waiting, batch = deque(documents), GrowingBatch([], torch.zeros(0, 1), torch.zeros(0, 1))
        while waiting or batch.documents:
            new = [waiting.popleft() for _ in range(min(len(waiting), most - len(batch.documents)))]
            if batch.cache is None:
                batch = GrowingBatch.of([*batch.documents, *new])
            elif new:
                batch = batch.joined(self._advanced(GrowingBatch.of(new), advance, most_steps=1))
            batch = self._advanced(batch, advance).without_ended()

    def _advanced(
        self, batch: GrowingBatch, advance: Callable[[int], None], most_steps: int | None = None
    ) -> GrowingBatch:
        """The batch with new tokens, until enough of its documents have ended."""
        steps = _Steps(self, batch.documents, advance)
        if not steps.most:
            return batch
        ends = list(self.ends)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(steps.most, most_steps or steps.most),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            return_dict_in_generate=True,
        )
        with plain_generation(self.layerwise.model):
            output: Any = self.layerwise.model.generate(
                batch.input_ids.to(self.layerwise.device),
                attention_mask=batch.mask.to(self.layerwise.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([refuse_nan, steps.choose]),
                stopping_criteria=StoppingCriteriaList([steps.stop]),
                **({} if batch.cache is None else {self._cache_argument: batch.cache}),
            )
        return batch.extended(output.sequences, output.past_key_values if self.selectable else None)


class _Steps:
    """What happens at each step of a call of `generate`: tokens are drawn, and documents end.

    Attributes:
        most: steps, until all documents have ended.
    """

    def __init__(self, sampler: Sampler, documents: Sequence[GrowingDocument], advance: Callable[[int], None]) -> None:
        self.sampler, self.advance, self.count = sampler, advance, 0
        self.room = torch.tensor([document.room for document in documents])
        self.most = int(self.room.max())
        self.ended = self.room == 0
        self.uniforms = torch.zeros(len(documents), self.most, dtype=torch.float64)
        for row, document in enumerate(documents):
            self.uniforms[row, : document.room] = torch.from_numpy(
                document.uniforms[-document.room or self.sampler.length :]
            )
        self._ends = torch.tensor(sampler.ends, dtype=torch.long)
        self._enough = LEAVE if sampler.selectable else LEAVE_AND_READ

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, [B, V], of which the highest is the token drawn."""
        return drawn(scores, self.uniforms[:, self.count], self.sampler.temperature, self.sampler.top_p)

    def stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether to stop, for all rows alike: once enough of the documents have ended."""
        stop_if_asked()
        self.advance(int((~self.ended).sum()))
        self.count += 1
        self.ended |= torch.isin(input_ids[:, -1].cpu(), self._ends) | (self.room <= self.count)
        enough = bool(self.ended.float().mean() >= self._enough)
        return torch.full((len(input_ids),), enough, device=input_ids.device)


def drawn(scores: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Scores, [B, V], of which the highest is the token that the uniform numbers, [B], draw; overwrites `scores`."""
    probabilities = torch.softmax(scores / temperature, dim=-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    tokens = invert(probabilities, uniforms)
    return scores.zero_().scatter_(1, tokens.to(scores.device)[:, None], 1.0)


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

    Blocks of the vocabulary are summed first, so that a cumulative sum in float64, exact enough for the last of many
    tokens, is made over few numbers.

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
