"""The result of a scoring, and the order in which layers are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layerpeel.tasks.scores import Evaluation


@dataclass
class LayerScores:
    """The importance of each candidate, by teacher layer: quality lost when it is skipped; low goes first.

    Attributes:
        metric: the deciding metric, as the config names it.
        importance: of the candidates that it scored.
        stderr: the standard error of each importance, where the metric runs tasks.
        evaluations: task scores of each candidate, where the metric runs tasks.
        dropped: candidates that a race dropped, with the share of the samples after which it did.
        seconds: how long the scoring took.
        layer_tokens: token-layer pairs that were run for it, as `work` counts them.
        from_round: the round whose ranking this is, if it is an earlier one.
        memory: the budget in bytes, and how often it was halved because memory ran out.
        cheap: the scores that made the shortlist, if there is one.
        healed: aggregate lost to the teacher after a short distillation, of those healed on trial.
        heal_seconds: how long the trials took.
    """

    metric: str
    importance: dict[int, float]
    stderr: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    dropped: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    layer_tokens: int = 0
    from_round: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
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

    def to_json(self) -> dict[str, Any]:
        """For the journal; with a shortlist, whether the cheap metric alone would have chosen the same layer."""
        own: dict[str, Any] = {"metric": self.metric, "seconds": round(self.seconds, 3)}
        own |= {"layer_tokens": self.layer_tokens, **self.memory}
        if self.from_round:
            own["from_round"] = self.from_round
        for name in ("importance", "stderr", "dropped", "healed"):
            if values := getattr(self, name):
                own[name] = {str(layer): value for layer, value in sorted(values.items())}
        if len(self.tied()) > 1:
            own["tied"] = self.tied()
        if self.evaluations:
            own["evaluations"] = {str(layer): e.to_json() for layer, e in sorted(self.evaluations.items())}
        if self.healed:
            own["heal_seconds"] = round(self.heal_seconds, 3)
        if self.cheap:
            own["cheap"] = self.cheap.to_json()
            own["cheap_chooses_same"] = self.cheap.ranked()[0] == self.ranked()[0]
        return own


def last_ranking(rounds: Sequence[dict[str, Any]], every: int, free: Sequence[int]) -> LayerScores | None:
    """What the last scoring of a run said of the layers that may still go; None if it is time to score again.

    Args:
        rounds: events of the finished rounds.
        every: as `score.every`.
        free: teacher layers that may go next.
    """
    if not rounds or (every and len(rounds) % every == 0):
        return None
    last = rounds[-1]["scores"]
    sure = {
        layer for layer in map(int, last["importance"]) if layer in free and str(layer) not in last.get("dropped", {})
    }
    if not sure:
        return None
    importance, stderr = (
        {int(layer): value for layer, value in last.get(name, {}).items() if int(layer) in sure}
        for name in ("importance", "stderr")
    )
    return LayerScores(last["metric"], importance, stderr, from_round=last.get("from_round", len(rounds)))
