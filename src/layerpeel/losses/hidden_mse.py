"""Mean squared error on hidden states, at the last trained layer and after the final norm (arXiv 2511.05085)."""

from __future__ import annotations

from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs


class HiddenMSE(Loss):
    """Mean over real tokens of the squared error between student and teacher, summed over the two places."""

    relative: bool = True
    """Divide each token's error by the teacher's mean square at that token. Some tokens, the first one above all,
    carry hidden states a thousand times larger than the rest; a plain mean, or one mean square for the batch, would
    be about them alone."""

    def __call__(self, outputs: StepOutputs) -> Tensor:
        inner = self._error(outputs.student_inner, outputs.teacher_inner, outputs.mask)
        final = self._error(outputs.student_final, outputs.teacher_final, outputs.mask)
        return (inner + final) / max(outputs.step_tokens, 1)

    def _error(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        student, teacher = student[mask].float(), teacher[mask].float()
        error = (student - teacher).square().mean(-1)
        return (error / teacher.square().mean(-1).clamp_min(1e-12) if self.relative else error).sum()
