"""The section `score`: how layers are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from layerpeel.config.fields import AS_BYTES, AS_COUNT, Section, Texts


class ShortlistConfig(Section):
    """A cheap metric that chooses which layers the deciding one looks at."""

    by: str = "teacher_kl"
    """A name from the table of metrics, or module:Class."""
    keep: Annotated[int, Field(ge=1)]
    """How many candidates stay."""


class ProtectConfig(Section):
    """Layers that never go, by the teacher's index."""

    first: Annotated[int, Field(ge=0)] = 1
    """This many of the first."""
    last: Annotated[int, Field(ge=0)] = 1
    """This many of the last."""
    layers: list[int] = []
    """And these."""
    pattern: bool = False
    """And those without which a cycle of layer kinds, which some runtimes take as fixed, would break."""


class RaceConfig(Section):
    """Scores in growing shares of the samples, or of the rows of text; candidates that are surely worse get no more."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    """How sure, for one candidate in one comparison with the best (one-sided, paired on the same samples)."""
    first_share: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """The share of each task's samples, or of the rows, after which candidates first drop out; half as many more each
    time."""


class HealConfig(Section):
    """A short distillation of the last few candidates before the choice."""

    keep: Annotated[int, Field(ge=2)] = 2
    """How many."""
    steps: Annotated[int, Field(ge=1), AS_COUNT] = 20
    """Optimizer steps for each, as `distill` says, but for their number and without repair."""


class ScoreConfig(Section):
    """How layers are scored."""

    decide: str = "task_quality"
    """The metric whose lowest layer goes: a name from the table of metrics, or module:Class."""
    shortlist: ShortlistConfig | None = None
    """Score all candidates by a cheap metric first, and only the best by `decide`."""
    protect: ProtectConfig = ProtectConfig()
    """Layers that never go."""
    every: Annotated[int, Field(ge=0)] = 1
    """Score again every so many rounds; the rounds between remove the next of the last ranking. 0: rank once. A ranking
    that is used up, as that of a shortlist may be, is made anew."""
    text: Texts | None = None
    """Text for the metrics that read it; that of `distill` if not given."""
    tokens: Annotated[int, Field(ge=1), AS_COUNT] = 16_384
    """How many tokens of it; padding does not count."""
    race: RaceConfig | None = None
    """Stop early on candidates that are surely worse; for task_quality, and for metrics that compare distributions on
    text, as teacher_kl."""
    heal: HealConfig | None = None
    """In a run: before the choice, distil the gap of the best few for a moment, and choose by what tasks say then."""
    memory: Annotated[int, Field(ge=2**20), AS_BYTES] | None = None
    """Bytes for the branches of all candidates, as 8GB; 1GB on a CPU, half of what is free on a GPU, if not given."""
    weights: Literal["memory", "stream"] = "memory"
    """stream: layers are read from the checkpoint one at a time while the model is scored, so that one larger than
    memory can be. In a run, distill.weights has to be the same."""
