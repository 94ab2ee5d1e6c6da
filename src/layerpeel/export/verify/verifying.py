"""Compares a student with a runtime, and says whether the runtime computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layerpeel.export.verify.answers import Answers, Question
from layerpeel.export.verify.causes import TOKENIZER, cause_of_error
from layerpeel.export.verify.comparison import Comparison, compare_distributions, first_difference
from layerpeel.export.verify.facts import differing_facts, facts_of
from layerpeel.export.verify.limits import PRECISIONS, Limits
from layerpeel.export.verify.reference import Reference

SHOWN_IDS = 8
DEFAULT_PRECISION = "16-bit"  # of servers, which do not say theirs


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime computes a student, and what is likely to be wrong if not.

    Attributes:
        runtime: its name and version.
        precision: whose limits count.
        limits: these.
        comparison: how far it is.
        faults: what is above the limits, in words; none if the runtime is right.
        causes: what is likely to be wrong, the best known first.
        notes: what was not compared.
    """

    runtime: str
    precision: str
    limits: Limits
    comparison: Comparison
    faults: list[str]
    causes: list[str]
    notes: list[str]

    @property
    def is_right(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        measured = self.comparison
        return {
            "runtime": self.runtime,
            "precision": self.precision,
            "right": self.is_right,
            "mean_kl": measured.mean_kl,
            "max_kl": max(measured.kl, default=0.0),
            "same_top": measured.same_top_share,
            "limits": {"mean_kl": self.limits.kl, "same_top": self.limits.same_top, "why": self.limits.why},
            "same_token_ids": measured.first_other_token is None,
            "first_other_token": measured.first_other_token,
            "same_greedy_text": measured.same_greedy,
            "faults": self.faults,
            "causes": self.causes,
            "notes": self.notes,
            "positions": measured.positions,
            "kl": measured.kl,
        }


def verify(reference: Reference, question: Question, answers: Answers, precision: str | None = None) -> Verdict:
    """Compares token ids first, then distributions position by position, then greedy text.

    Args:
        precision: of `PRECISIONS`; what the runtime says, if None.
    """
    compared = compare(reference, question, answers)
    stated = precision or answers.precision
    precision = stated or DEFAULT_PRECISION
    limits, facts = PRECISIONS[precision], facts_of(reference.config)
    faults = _faults(compared, limits)
    windows = [facts["sliding_window"]] if "sliding_window" in facts else []
    pattern = cause_of_error(compared.positions, compared.kl, limits.kl, windows)
    if pattern and not faults:
        faults.append("the error is not that of rounding, though its mean is below the limit")
    differences, notes = differing_facts(facts, answers.facts), _notes(question, answers, facts)
    if not stated:
        notes.append(f"the runtime does not say its precision: the limits are those of {precision} (--precision)")
    head = differences.pop("separate_head", None)
    if differences and not faults:
        faults.append("its config or header says something else than the student's")
    if head and faults:
        differences["separate_head"] = head
    elif head:
        notes.append(f"{head}: it computes the same, in a larger file")
    causes = [TOKENIZER] if compared.first_other_token is not None else []
    causes += [*differences.values(), *([pattern] if pattern else [])]
    return Verdict(answers.runtime, precision, limits, compared, faults, causes, notes)


def compare(reference: Reference, question: Question, answers: Answers) -> Comparison:
    """How far the answers are from the student's own."""
    other = first_difference(question, answers)
    kl, same_top = compare_distributions(reference.log_probs(question), answers)
    ids = (
        ([], []) if other is None else tuple(_excerpt(each, other) for each in (question.token_ids, answers.token_ids))
    )
    greedy = None
    if answers.greedy is not None:
        continued = answers.greedy if isinstance(answers.greedy, str) else reference.text_of(answers.greedy)
        greedy = reference.text_of(reference.greedy(question)), continued
    return Comparison(question.positions, kl, same_top, other, ids, greedy)  # type: ignore[arg-type]


def with_name(verdict: Verdict, name: str) -> Verdict:
    """The verdict with a name before the runtime's, where there are several files."""
    return replace(verdict, runtime=f"{name}: {verdict.runtime}")


def _excerpt(ids: list[int] | None, start: int) -> list[int]:
    return (ids or [])[start : start + SHOWN_IDS]


def _faults(compared: Comparison, limits: Limits) -> list[str]:
    faults = []
    if compared.first_other_token is not None:
        faults.append(f"other token ids from token {compared.first_other_token} on")
    if compared.mean_kl > limits.kl:
        faults.append(f"KL {compared.mean_kl:.2g}, above {limits.kl:g}")
    if compared.same_top_share < limits.same_top:
        faults.append(f"same most likely token at {compared.same_top_share:.1%}, below {limits.same_top:.0%}")
    return faults


def _notes(question: Question, answers: Answers, facts: dict[str, Any]) -> list[str]:
    notes = []
    if answers.token_ids is None:
        notes.append("the runtime gives no token ids: its tokenizer was not compared")
    if answers.greedy is None:
        notes.append("the runtime gives no greedy text")
    if facts.get("sliding_window", 0) >= len(question.token_ids):
        notes.append(
            f"the text has {len(question.token_ids)} tokens, not more than the window of {facts['sliding_window']}: an "
            "error of the window would not show (--tokens)"
        )
    return notes
