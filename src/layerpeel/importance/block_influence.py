"""Block Influence: 1 - mean cosine between a layer's input and output (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from layerpeel.importance.text_metrics import HiddenStateMetric


class BlockInfluence(HiddenStateMetric):
    """How much a layer turns its hidden states, mean over real tokens; no layer is skipped for it."""

    def measure(self, before: Tensor, after: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(before, after, dim=-1)
