"""Block Influence: 1 - mean cosine between a layer's input and output (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from layerpeel.importance.base import Metric, ScoringInputs
from layerpeel.progress import progress


class BlockInfluence(Metric):
    """How much a layer turns its hidden states, mean over real tokens; no layer is skipped for it."""

    needs = frozenset({"text"})

    def score(self, inputs: ScoringInputs) -> dict[int, float]:
        total = torch.zeros(len(inputs.student.layers), dtype=torch.float64)
        tokens = 0
        with progress("scoring by block_influence", len(inputs.batches)) as advance:
            for input_ids, mask in inputs.batches:
                input_ids, mask = input_ids.to(inputs.student.device), mask.to(inputs.student.device)

                def watch(position: int, before: Tensor, after: Tensor, mask: Tensor = mask) -> None:
                    cosine = functional.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
                    total[position] += (1 - cosine).double().sum().cpu()

                inputs.student.walk(input_ids, watch=watch)
                tokens += int(mask.sum())
                advance()
        return {position: float(total[position] / tokens) for position in inputs.candidates}
