"""Block Influence: 1 - mean cosine between a layer's input and output (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from layerpeel.importance.base import Metric, MetricResult, ScoringInputs, mean_over_text


class BlockInfluence(Metric):
    """How much a layer turns its hidden states, mean over real tokens; no layer is skipped for it."""

    needs = frozenset({"text"})
    skips = False

    def score(self, inputs: ScoringInputs) -> MetricResult:
        def measure(input_ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
            turned = torch.zeros(len(inputs.student.layers), dtype=torch.float64)

            def hook(position: int, before: Tensor, after: Tensor) -> None:
                cosine = functional.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
                turned[position] = (1 - cosine).double().sum().cpu()

            inputs.student.forward_with_skips(
                input_ids, hook=hook, positions=positions, tokens_per_call=inputs.budget.tokens_per_call
            )
            return turned

        means = mean_over_text(inputs, 1, measure, "scoring by block_influence")
        return MetricResult({position: means[position] for position in inputs.candidates})
