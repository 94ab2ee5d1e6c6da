"""Answers a task's requests, for the model as it is and for every candidate skipped, in one pass.

Answers come as one list a stream: the untouched model first, then each candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerpeel.progress import progress
from layerpeel.stack import Stack, skipping_by_row
from layerpeel.tasks.base import Generation, LogLikelihood, Request, Task, TaskScore

Answer = float | str
# Tokens, over all streams, that go through a layer at a time.
TOKENS_PER_CALL = 16_384


def score_tasks(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], candidates: Sequence[int] = ()
) -> list[dict[str, TaskScore]]:
    """Scores each task on each stream.

    Returns:
        1 + C dicts from task name to score.
    """
    streams: list[dict[str, TaskScore]] = [{} for _ in range(1 + len(candidates))]
    for task in tasks:
        answers = answer_requests(stack, tokenizer, task.requests(tokenizer), candidates, task.name)
        for stream, own in zip(streams, answers, strict=True):
            stream[task.name] = task.score(own)
    return streams


def answer_requests(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    candidates: Sequence[int] = (),
    description: str = "answering",
) -> list[list[Answer]]:
    """Answers requests of both kinds, in their order.

    Args:
        candidates: positions to skip, ascending.

    Returns:
        1 + C lists of answers: summed natural-log probabilities, or generated text up to the first stop.
    """
    answers: list[list[Answer]] = [[0.0] * len(requests) for _ in range(1 + len(candidates))]
    with progress(description, len(requests)) as advance:
        for batch in _batches(requests, 1 + len(candidates), _context_length(stack)):
            chosen = [requests[index] for index in batch]
            likelihoods = [r for r in chosen if isinstance(r, LogLikelihood)]
            generations = [r for r in chosen if isinstance(r, Generation)]
            if likelihoods:
                values: list[list[Answer]] = [list(row) for row in log_likelihoods(stack, likelihoods, candidates)]
            else:
                values = [list(row) for row in generate(stack, tokenizer, generations, candidates)]
            for stream, own in zip(answers, values, strict=True):
                for index, value in zip(batch, own, strict=True):
                    stream[index] = value
            advance(len(batch))
    return answers


@torch.no_grad()
def log_likelihoods(
    stack: Stack, requests: Sequence[LogLikelihood], candidates: Sequence[int] = ()
) -> list[list[float]]:
    """Log-probability of each continuation after its context; too long a context loses its beginning.

    Returns:
        [1 + C][requests].
    """
    limit = _context_length(stack)
    rows = [(r.context + r.continuation)[-(limit + 1) :] for r in requests]
    lengths = [min(len(r.continuation), len(row) - 1) for r, row in zip(requests, rows, strict=True)]
    width = max(len(row) - 1 for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row) - 1] = torch.tensor(row[:-1])
    hidden = stack.walk(input_ids.to(stack.device), candidates)
    owner = torch.tensor([index for index, count in enumerate(lengths) for _ in range(count)])
    place = torch.tensor([len(row) - 1 - n + k for row, n in zip(rows, lengths, strict=True) for k in range(n)])
    target = torch.tensor([token for row, n in zip(rows, lengths, strict=True) for token in row[len(row) - n :]])
    scored = _token_log_probabilities(stack, hidden[:, owner, place], target.to(stack.device)).cpu()
    sums = torch.zeros(len(hidden), len(rows), dtype=torch.float64).index_add_(1, owner, scored.double())
    return sums.tolist()


def _token_log_probabilities(stack: Stack, hidden: Tensor, target: Tensor) -> Tensor:
    """[S, N, D] hidden states and [N] next tokens -> [S, N] log-probabilities, in chunks of the head's size."""
    rows = stack.logit_rows(streams=len(hidden))
    parts = []
    for start in range(0, len(target), rows):
        chunk = hidden[:, start : start + rows]
        logits = stack.logits(chunk.flatten(0, 1)).float().unflatten(0, chunk.shape[:2])
        index = target[start : start + rows].expand(len(hidden), -1)[..., None]
        parts.append(logits.gather(-1, index)[..., 0] - logits.logsumexp(-1))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def generate(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Generation],
    candidates: Sequence[int] = (),
) -> list[list[str]]:
    """Greedy text for each prompt, all streams in one decode loop with the model's own cache.

    Returns:
        [1 + C][requests], each cut at its first stop.
    """
    stops = requests[0].stop
    limit = max(r.max_new_tokens for r in requests)
    prompts = [r.prompt[-max(1, _context_length(stack) - limit) :] for r in requests]
    width, streams = max(map(len, prompts)), 1 + len(candidates)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for index, prompt in enumerate(prompts):
        input_ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    ends = _end_tokens(tokenizer, stops)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
    )
    with skipping_by_row(stack, candidates, len(prompts)):
        output = stack.model.generate(
            input_ids.repeat(streams, 1).to(stack.device),
            attention_mask=mask.repeat(streams, 1).to(stack.device),
            generation_config=config,
        )
    new = output[:, width:].unflatten(0, (streams, len(prompts))).tolist()
    return [
        [_text(tokenizer, ids[: r.max_new_tokens], r.stop) for ids, r in zip(stream, requests, strict=True)]
        for stream in new
    ]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


_END_TOKENS: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}


def _end_tokens(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """End of text, and every token that holds a stop: nothing after it would be read."""
    key = (id(tokenizer), len(tokenizer), tuple(stops))
    if key not in _END_TOKENS:
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        held = [index for index, text in enumerate(texts) if any(stop in text for stop in stops)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        _END_TOKENS[key] = list(dict.fromkeys(end + held)) or [0]
    return _END_TOKENS[key]


def _batches(requests: Sequence[Request], streams: int, limit: int) -> Iterator[list[int]]:
    """Indices of requests that go together: of one kind, alike in length, longest first, within the token budget."""

    def kind_and_length(index: int) -> tuple[object, ...]:
        request = requests[index]
        if isinstance(request, Generation):
            return (1, request.stop, -request.max_new_tokens, -len(request.prompt))
        return (0, (), 0, -len(request.context) - len(request.continuation))

    def tokens(index: int) -> int:
        request = requests[index]
        if isinstance(request, Generation):
            return min(limit, len(request.prompt) + request.max_new_tokens)
        return min(limit, len(request.context) + len(request.continuation))

    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(requests)), key=kind_and_length):
        longest = max(longest, tokens(index))
        apart = batch and kind_and_length(index)[:2] != kind_and_length(batch[0])[:2]
        if batch and (apart or streams * longest * (len(batch) + 1) > TOKENS_PER_CALL):
            yield batch
            batch, longest = [], tokens(index)
        batch.append(index)
    if batch:
        yield batch


def _context_length(stack: Stack) -> int:
    return getattr(stack.model.config, "max_position_embeddings", None) or 2048
