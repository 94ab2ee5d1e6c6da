"""Log-likelihoods of continuations, for the model as it is and with each candidate skipped, in one forward.

Shapes: S branches (the untouched model first, then each candidate), B batch, T tokens, D hidden, R requests,
N continuation tokens of all requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerpeel.inference.budget import Budget
from layerpeel.inference.kv_cache import PrefillCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.prefix_tree import TreeRow, pack, pad_rows, single
from layerpeel.inference.requests import LogLikelihood
from layerpeel.model.config_fields import attention_reach, context_length
from layerpeel.processes.progress import print_once

DEFAULT_WINDOW = 2048  # tokens, for models whose config does not say


@torch.no_grad()
def log_likelihoods(
    layerwise: LayerwiseModel,
    candidates: Sequence[int],
    requests: Sequence[LogLikelihood],
    budget: Budget,
    kv_cache: PrefillCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs contexts and continuations on all branches.

    Args:
        candidates: positions to skip, ascending.
        budget: says in which chunks; the requests themselves all go in one batch.
        kv_cache: takes the keys and values.

    Returns:
        the log-probability of each continuation, [S, R] of float64; and how many of its first tokens greedy decoding
        gives too, [S, R].
    """
    limit, branches = window_length(layerwise), 1 + len(candidates)
    sequences = [(r.context + r.continuation)[-(limit + 1) :] for r in requests]
    lengths = [len(r.continuation) for r in requests]
    rows = list(_rows(layerwise, [sequence[:-1] for sequence in sequences]))
    input_ids, positions, attention_mask = pad_rows(rows)
    hidden = layerwise.forward_with_skips(
        input_ids,
        candidates,
        positions=positions,
        attention_mask=attention_mask,
        kv_cache=kv_cache.layers if kv_cache else None,
        tokens_per_call=budget.tokens_per_call,
    )
    width = input_ids.shape[1]
    if kv_cache:
        kv_cache.paths = {i: torch.tensor(path) + n * width for n, row in enumerate(rows) for i, path in row.paths}
    request, node, token, offset = _continuation_tokens(rows, sequences, lengths, width)
    logit_rows = budget.logit_rows(layerwise, branches)
    log_probabilities, greedy = _token_scores(layerwise, hidden.flatten(1, 2), node, token, logit_rows)
    sums = torch.zeros(branches, len(requests), dtype=torch.float64).index_add_(1, request, log_probabilities)
    agreed = torch.tensor(lengths).repeat(branches, 1)
    first_miss = torch.where(greedy, agreed[:, request], offset)
    return sums, agreed.scatter_reduce_(1, request.expand_as(first_miss), first_miss, "amin")


def _continuation_tokens(
    rows: Sequence[TreeRow], sequences: Sequence[Sequence[int]], lengths: Sequence[int], width: int
) -> Tensor:
    """Of each continuation token: its request, the node that predicts it, its id, and its place in the continuation.

    Args:
        lengths: of the continuations, which end the sequences.
        width: T, of the padded rows.

    Returns:
        [4, N], sorted by node (number of the row * T + index in it), so that each node goes through the head once.
    """
    tokens = [
        (index, number * width + path[place - 1], sequences[index][place], place - start)
        for number, row in enumerate(rows)
        for index, path in row.paths
        for start in [len(sequences[index]) - lengths[index]]
        for place in range(start, len(sequences[index]))
    ]
    tokens.sort(key=lambda token: token[1])
    return torch.tensor(tokens).T if tokens else torch.zeros(4, 0, dtype=torch.long)


def _token_scores(
    layerwise: LayerwiseModel, hidden: Tensor, node: Tensor, target: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token after its node, and whether it is the most probable token.

    Args:
        hidden: [S, B * T, D].
        node, target: [N], sorted by node.
        rows: nodes that go through the head at a time.

    Returns:
        [S, N] of float64, and [S, N] of bool.
    """
    branches = len(hidden)
    nodes, node_index = torch.unique_consecutive(node, return_inverse=True)
    scores, greedy = [torch.zeros(branches, 0).double()], [torch.zeros(branches, 0).bool()]
    for start in range(0, len(nodes), rows):
        in_chunk = (node_index >= start) & (node_index < start + rows)
        logits = layerwise.logits(hidden[:, nodes[start : start + rows].to(hidden.device)].flatten(0, 1)).float()
        logits = logits.unflatten(0, (branches, -1))
        column, token = (node_index[in_chunk] - start).to(logits.device), target[in_chunk].to(logits.device)
        target_logits, highest = logits[:, column, token], logits.amax(-1, keepdim=True)
        log_sum_exp = logits.sub_(highest).exp_().sum(-1).log_() + highest[..., 0]  # in place
        scores.append((target_logits - log_sum_exp[:, column]).double().cpu())
        greedy.append((target_logits == highest[:, column, 0]).cpu())
    return torch.cat(scores, dim=1), torch.cat(greedy, dim=1)


def _rows(layerwise: LayerwiseModel, sequences: Sequence[Sequence[int]]) -> Iterator[TreeRow]:
    """Prefix trees, if the model runs them and its attention reaches far enough back; else one sequence a row.

    A row is at most 3/4 D tokens wide, unless one sequence is longer: so narrow, attention costs little beside the
    rest of a layer, even where its kernel for dense masks is slow.
    """
    longest, reach = max(map(len, sequences)), attention_reach(layerwise.model.config)
    if (reach is None or longest <= reach) and len(sequences) > 1 and layerwise.runs_trees:
        return pack(sequences, max(longest, layerwise.width * 3 // 4))
    return single(sequences)


def window_length(layerwise: LayerwiseModel) -> int:
    """Tokens of the longest sequence that the model is run on: its context length, or else `DEFAULT_WINDOW`."""
    length = context_length(layerwise.model.config)
    if length is None:
        print_once(f"the model's config does not say how long its context is; {DEFAULT_WINDOW:,} tokens are assumed")
    return length or DEFAULT_WINDOW
