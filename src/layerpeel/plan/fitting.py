"""Fits a first config into the memory of a device and into a time, by plans of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerpeel.errors import InputError
from layerpeel.plan.choices import Choices, Scoring
from layerpeel.plan.machine import Planner
from layerpeel.plan.planning import Plan
from layerpeel.plan.quality import Measure
from layerpeel.processes.text import size

# From the best to the cheapest; the first that fits its share of the time is taken.
BY_TASKS = [Scoring("task_quality", 4096), Scoring("task_quality", 2048)]
BY_TEXT = [
    *(Scoring("teacher_kl", tokens) for tokens in (16_384, 8192, 4096, 2048)),
    *(Scoring("teacher_kl", 2048, every) for every in (2, 3, 0)),
    *(Scoring("teacher_kl", tokens, 0) for tokens in (1024, 512, 256)),
]
SCORINGS = BY_TASKS + BY_TEXT
SHARES = {"scoring": 0.2, "evaluation": 0.1, "repair": 0.25}  # of the time, at most; training gets what is left
FOR_TOKENS = ("training", "sampling")
RESERVE = 0.1  # of the time, for what is not planned: loading, saving, the report
LEAST_TOKENS, LEAST_REPAIR, LEAST_ROWS = 2048, 4096, 16
ROWS_OF_TASKS = 50  # which a ranking by tasks needs at least
MOST_TOKENS = 10**8  # of a round; also those by which memory is planned
FASTER = 0.8  # the share of float32's time from which on bfloat16 is worth to take
STEPS = 6  # of the search for how many tokens fit

# By the phase of a run that takes the most memory: what makes it smaller, in this order.
SAVINGS: dict[str, list[dict[str, Any]]] = {
    "repair": [{"repair_tokens": 32_768}, {"repair_tokens": 0}],
    "scoring": [{"score_memory": 2**29}, {"score_memory": 2**27}],
    "training": [*({"batch_size": rows} for rows in (4, 2, 1)), {"checkpointing": True}, {"train": "neighbours"}],
}
REMEDY = "name a smaller model, or start where there is more memory (--gpu-memory says how much of it a run may take)"
OR_STREAM = "; or give --text: with text that the teacher need not write, its layers can be read from disk as they run"


@dataclass(frozen=True)
class Fitter:
    """Plans variants of a first config, with its tasks."""

    planner: Planner
    measures: Sequence[Measure] = ()

    def plan(self, choices: Choices, *, timed: bool = True) -> Plan:
        requests = [measure.first(choices.limit) for measure in self.measures]
        return self.planner.plan(choices.config(), requests, timed=timed)

    @property
    def may_be_narrow(self) -> bool:
        """Whether a model that would run in float32 is stored in bfloat16, so that nothing is lost by keeping it so."""
        return self.planner.device.type == "cpu" and self.planner.teacher.dtype is torch.bfloat16


def fit_memory(choices: Choices, fitter: Fitter, limit: float) -> tuple[Choices, Plan]:
    """The choices, with what it takes to fit into so many bytes; and a plan of them, without times.

    What cannot be in memory is read from the disk, where there is text that the teacher need not write.

    Raises:
        InputError: nothing fits.
    """
    fitted, planned = _with_savings(choices, fitter, limit)
    if planned.peak > limit and choices.text:
        step = None if fitter.planner.device.type == "cpu" else choices.batch_size * choices.sequence_length
        streamed = replace(choices, stream=True, train="neighbours", tokens_per_step=step)
        fitted, planned = _with_savings(streamed, fitter, limit)
    if planned.peak > limit:
        weights = size(planned.training_memory["weights"])
        raise InputError(
            f"{choices.teacher}: the smallest run of it takes {size(planned.peak)} of memory, {weights} of them "
            f"for its weights, and there are {size(limit)}",
            hint=REMEDY if choices.text else REMEDY + OR_STREAM,
        )
    return fitted, planned


def _with_savings(choices: Choices, fitter: Fitter, limit: float) -> tuple[Choices, Plan]:
    """The choices, with as much saved as it takes, or as can be; and the plan of them."""

    def plan() -> Plan:
        return fitter.plan(replace(choices, tokens_per_round=MOST_TOKENS), timed=False)

    planned, left = plan(), {phase: [*savings] for phase, savings in SAVINGS.items()}
    if planned.peak > limit and fitter.may_be_narrow:
        choices = replace(choices, dtype="bfloat16")
        planned = plan()
    while planned.peak > limit and (savings := left[_largest_phase(planned)]):
        choices = replace(choices, **savings.pop(0))
        planned = plan()
    return choices, planned


def _largest_phase(planned: Plan) -> str:
    phases = {
        "repair": planned.repair_memory,
        "scoring": planned.scoring_memory,
        "training": planned.training_memory,
    }
    return max(phases, key=lambda phase: sum(phases[phase].values()))


def fit_time(choices: Choices, fitter: Fitter, seconds: float) -> tuple[Choices, Plan]:
    """The choices, with sizes by which a run takes so many seconds; and the plan of them.

    Raises:
        InputError: the least that is of use takes longer.
    """
    least = replace(
        choices,
        scoring=SCORINGS[-1],
        limit=min(choices.limit, LEAST_ROWS),
        repair_tokens=0,
        tokens_per_round=LEAST_TOKENS,
    )
    planned = fitter.plan(least)
    if choices.dtype == "auto" and fitter.may_be_narrow:
        narrow = fitter.plan(replace(least, dtype="bfloat16"))
        if _total(narrow) < FASTER * _total(planned):
            choices, planned = replace(choices, dtype="bfloat16"), narrow
    usable = (1 - RESERVE) * seconds
    if _total(planned) > usable:
        minutes = math.ceil(_total(planned) / (1 - RESERVE) / 60)
        raise InputError(
            f"--minutes {seconds / 60:g}: the least that is of use takes about {minutes} here",
            hint=f"give --minutes {minutes} or more, or let fewer layers go: --target-layers N, with N above "
            f"{choices.target_layers}",
        )
    choices, planned = _with_shares(choices, fitter, usable)
    return _with_tokens(choices, fitter, planned, usable)


def _total(planned: Plan) -> float:
    return sum(planned.seconds.values())


def _with_shares(choices: Choices, fitter: Fitter, usable: float) -> tuple[Choices, Plan]:
    """The choices, with scoring, evaluation and repair as good as their shares of the time allow."""
    while True:
        planned, cheaper = fitter.plan(choices), choices
        for part, share in SHARES.items():
            over = planned.seconds.get(part, 0.0) / (share * usable)
            if over > 1:
                cheaper = _cheaper(cheaper, part, max(1, int(math.log2(over))))
        if cheaper == choices:
            return choices, planned
        choices = cheaper


def _cheaper(choices: Choices, part: str, halvings: int) -> Choices:
    """The choices with a part of the run that takes about half of its time, so many times; as they are at its least."""
    rows = max(min(choices.limit, LEAST_ROWS), choices.limit >> halvings)
    if part == "evaluation":
        return replace(choices, limit=rows)
    if part == "repair":
        tokens = choices.repair_tokens >> halvings
        return replace(choices, repair_tokens=tokens if tokens >= LEAST_REPAIR else 0)
    if choices.scoring in BY_TASKS and rows >= ROWS_OF_TASKS:
        return replace(choices, limit=rows)
    place = SCORINGS.index(choices.scoring) + (1 if choices.scoring in BY_TASKS else halvings)
    return replace(choices, scoring=SCORINGS[min(place, len(SCORINGS) - 1)])


def _with_tokens(choices: Choices, fitter: Fitter, planned: Plan, usable: float) -> tuple[Choices, Plan]:
    """The choices, with as many tokens of training, and text for them, as the rest of the time allows."""
    for _ in range(STEPS):
        spent = sum(planned.seconds.get(part, 0.0) for part in FOR_TOKENS)
        free = usable - (_total(planned) - spent)
        tokens = choices.tokens_per_round
        if 0.95 * free <= spent <= free or (spent > free and tokens == LEAST_TOKENS):
            break
        wanted = min(MOST_TOKENS, max(LEAST_TOKENS, _rounded_down(tokens * free / max(spent, 1e-9))))
        if wanted == tokens:
            break
        choices = replace(choices, tokens_per_round=wanted)
        planned = fitter.plan(choices)
    return choices, planned


def _rounded_down(value: float) -> int:
    """To two digits."""
    if value < 1:
        return 0
    unit = 10 ** max(0, int(math.log10(value)) - 1)
    return int(value // unit * unit)
