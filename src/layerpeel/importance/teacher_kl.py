"""How far the next-token distribution moves from the teacher's when a layer is skipped.

The fitness of EvoPress (arXiv 2410.14649): cheap, and close to what tasks would say.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from layerpeel.importance.base import Metric, MetricResult, ScoringInputs, mean_over_text
from layerpeel.inference.layerwise import LayerwiseModel


class TeacherKL(Metric):
    """KL(teacher || student with the layer skipped), mean over real tokens, less that of the student as it is."""

    needs = frozenset({"text"})

    @torch.no_grad()
    def score(self, inputs: ScoringInputs) -> MetricResult:
        def measure(input_ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
            chunk = inputs.budget.tokens_per_call
            streams = inputs.student.forward_with_skips(
                input_ids, inputs.candidates, positions=positions, tokens_per_call=chunk
            )[:, mask]
            alone = inputs.teacher is inputs.student
            target = streams[0] if alone else inputs.teacher.forward_with_skips(input_ids, positions=positions)[0][mask]
            rows = inputs.budget.logit_rows(inputs.teacher, 3)
            return _divergence(inputs.teacher, target, inputs.student, streams, rows)

        own, *skipped = mean_over_text(inputs, 1 + len(inputs.candidates), measure, "scoring by teacher_kl")
        return MetricResult({position: mean - own for position, mean in zip(inputs.candidates, skipped, strict=True)})


def _divergence(teacher: LayerwiseModel, target: Tensor, student: LayerwiseModel, streams: Tensor, rows: int) -> Tensor:
    """Sum over N positions of the KL of [S, N, D] hidden states to [N, D] of the teacher's: [S]."""
    total = torch.zeros(len(streams), dtype=torch.float64, device=streams.device)
    for start in range(0, len(target), rows):
        wanted = teacher.logits(target[start : start + rows]).float().log_softmax(-1)
        for stream, hidden in enumerate(streams[:, start : start + rows]):
            own = student.logits(hidden).float().log_softmax(-1)
            total[stream] += functional.kl_div(own, wanted, log_target=True, reduction="sum")
    return total
