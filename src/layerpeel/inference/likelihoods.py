"""Log-likelihoods of continuations, for the model as it is and for every candidate skipped, in one walk.

Shapes: S streams (the untouched model first, then each candidate), B batch, T tokens, D hidden, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerpeel.inference.kv_cache import PrefillCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.prefix_tree import Row, pack, pad_rows, single
from layerpeel.inference.requests import LogLikelihood
from layerpeel.model.config_fields import attention_reach, context_length


@torch.no_grad()
def log_likelihoods(
    layerwise: LayerwiseModel,
    candidates: Sequence[int],
    requests: Sequence[LogLikelihood],
    keys: PrefillCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Walks over contexts and continuations, on all streams.

    Args:
        candidates: positions to skip, ascending.
        keys: takes what attention computed.

    Returns:
        the log-probability of each continuation, [S, requests] of float64; and how many of its first tokens greedy
        decoding gives too, [S, requests].
    """
    limit, streams = window_length(layerwise), 1 + len(candidates)
    sequences = [(r.context + r.continuation)[-(limit + 1) :] for r in requests]
    lengths = [len(r.continuation) for r in requests]
    rows = list(_rows(layerwise, [sequence[:-1] for sequence in sequences]))
    input_ids, positions, attention_mask = pad_rows(rows)
    width = input_ids.shape[1]
    hidden = layerwise.forward_with_skips(
        input_ids, candidates, positions=positions, attention_mask=attention_mask, keys=keys.layers if keys else None
    )
    if keys:
        keys.paths = {i: torch.tensor(path) + n * width for n, row in enumerate(rows) for i, path in row.paths}
    asked = [
        (index, number * width + path[place - 1], sequences[index][place], place - start)
        for number, row in enumerate(rows)
        for index, path in row.paths
        for start in [len(sequences[index]) - lengths[index]]
        for place in range(start, len(sequences[index]))
    ]
    asked.sort(key=lambda ask: ask[1])  # by node, so that each node goes through the head once
    owner, node, target, place = torch.tensor(asked).T if asked else torch.zeros(4, 0, dtype=torch.long)
    scored, best = _token_scores(layerwise, hidden.flatten(1, 2), node, target)
    sums = torch.zeros(streams, len(requests), dtype=torch.float64).index_add_(1, owner, scored)
    same = torch.tensor(lengths).repeat(streams, 1)
    missed = torch.where(best, same[:, owner], place)
    return sums, same.scatter_reduce_(1, owner.expand_as(missed), missed, "amin")


def _token_scores(layerwise: LayerwiseModel, hidden: Tensor, node: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target after its node, and whether it is the most probable token.

    Args:
        hidden: [S, B * T, D].
        node, target: [N], sorted by node.

    Returns:
        [S, N] of float64, and [S, N] of bool.
    """
    streams = len(hidden)
    nodes, which = torch.unique_consecutive(node, return_inverse=True)
    rows = layerwise.logit_rows(streams)
    scores, bests = [], []
    for start in range(0, len(nodes), rows):
        here = (which >= start) & (which < start + rows)
        logits = layerwise.logits(hidden[:, nodes[start : start + rows].to(hidden.device)].flatten(0, 1)).float()
        logits = logits.unflatten(0, (streams, -1))
        column, token = (which[here] - start).to(logits.device), target[here].to(logits.device)
        own, top = logits[:, column, token], logits.amax(-1, keepdim=True)
        total = logits.sub_(top).exp_().sum(-1).log_() + top[..., 0]  # log-sum-exp, in place
        scores.append((own - total[:, column]).double().cpu())
        bests.append((own == top[:, column, 0]).cpu())
    empty = torch.zeros(streams, 0)
    return torch.cat([empty.double(), *scores], dim=1), torch.cat([empty.bool(), *bests], dim=1)


def _rows(layerwise: LayerwiseModel, sequences: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Trees, where the model runs them and the layers see far enough back; else one sequence a row.

    A row is narrower than the hidden size where sequences allow it: there, attention costs a small part of what else a
    layer does, also where it is slow.
    """
    longest, reach = max(map(len, sequences)), attention_reach(layerwise.model.config)
    if (reach is None or longest <= reach) and len(sequences) > 1 and layerwise.runs_trees:
        return pack(sequences, max(longest, layerwise.width * 3 // 4))
    return single(sequences)


def window_length(layerwise: LayerwiseModel) -> int:
    """Tokens that the model reads at a time: its context length, or 2,048 where its config does not say."""
    return context_length(layerwise.model.config) or 2048
