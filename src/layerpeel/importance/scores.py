"""The result of a scoring, and the order in which layers are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layerpeel.tasks.scores import Evaluation


@dataclass
class LayerScores:
    """The importance of each candidate, by teacher layer: quality lost when it is skipped; low goes first.

    Attributes:
        metric: the deciding metric, as the config names it.
        importance: of the candidates that it scored.
        stderr: the standard error of each importance, over samples or rows of text, where there are several.
        evaluations: task scores of each candidate, where the metric runs tasks.
        dropped: candidates that a race gave up, with the share of the samples after which it did.
        seconds: what it took.
        layer_tokens: tokens that went through a layer for it, as `work` counts them.
        from_round: the round whose ranking this is, if it was not made anew.
        memory: the budget in bytes.
        memory_halved: how often memory ran out and the budget was halved.
        cheap: the scores that made the shortlist, if one was asked for.
        healed: aggregate lost to the teacher after a short distillation, of the few that were healed on trial.
        heal_seconds: what that took.
    """

    metric: str
    importance: dict[int, float]
    stderr: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    dropped: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    layer_tokens: int = 0
    from_round: int | None = None
    memory: int = 0
    memory_halved: int = 0
    cheap: LayerScores | None = None
    healed: dict[int, float] = field(default_factory=dict)
    heal_seconds: float = 0.0

    def ranked(self) -> list[int]:
        """Teacher layers, least important first.

        Those healed on trial come first, by what they lost after it; those that a race dropped come last; ties are
        broken by index.
        """
        return sorted(self.importance, key=lambda layer: (*self._sort_key(layer), layer))

    def tied(self) -> list[int]:
        """The layers whose score equals the lowest one exactly; the one with the lowest index is removed."""
        ranked = self.ranked()
        return [layer for layer in ranked if self._sort_key(layer) == self._sort_key(ranked[0])]

    def _sort_key(self, layer: int) -> tuple[bool, bool, float]:
        lost = self.healed.get(layer, self.importance[layer])
        return (layer not in self.healed, layer in self.dropped, lost)

    @property
    def cheap_chooses_same(self) -> bool:
        """Whether the metric of the shortlist alone would have chosen the same layer; False without one."""
        return self.cheap is not None and self.cheap.ranked()[0] == self.ranked()[0]


def last_ranking(last: LayerScores, finished: int, every: int, free: Sequence[int]) -> LayerScores | None:
    """The last scoring of a run, of the layers that may still be removed; None if it is time to score again.

    Args:
        last: the scores of the last finished round.
        finished: how many rounds are; at least one.
        every: as `score.every`.
        free: teacher layers that may go next.
    """
    if every and finished % every == 0:
        return None
    ranked = {layer for layer in last.importance if layer in free and layer not in last.dropped}
    if not ranked:
        return None
    importance, stderr = (
        {layer: value for layer, value in values.items() if layer in ranked}
        for values in (last.importance, last.stderr)
    )
    return LayerScores(last.metric, importance, stderr, from_round=last.from_round or finished)
