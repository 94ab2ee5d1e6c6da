"""Signs that the text which the teacher wrote has degenerated, as checks on a run's record (see `run.health`)."""

from __future__ import annotations

from collections.abc import Iterator

from layerpeel.run.events import Finding, TeacherText
from layerpeel.run.record import RunRecord

# Shares of the documents, from which on it is worth to say so, where there are so many documents.
LOOPING, ALIKE, EMPTY, ENDED, LEAST_DOCUMENTS = 0.1, 0.5, 0.5, 0.05, 20
OTHER_BEGINNINGS = (
    "look at the samples in the report; give prompts ({from: teacher, prompts: FILE}), or text of your own in its place"
)


def degenerate_text(run: RunRecord) -> Iterator[Finding]:
    """Texts of the teacher's that repeat themselves, are all of one kind, are empty, or never come to an end."""
    for text in run.teacher_texts:
        if text.documents >= LEAST_DOCUMENTS:
            yield from _signs(text)


def _signs(text: TeacherText) -> Iterator[Finding]:
    if text.looping > LOOPING:
        yield _finding(
            "looping_text",
            "warning",
            f"{text.looping:.0%} of the {text.documents:,} documents that the teacher wrote repeat themselves",
            "raise temperature or top_p towards 1, with which loops are rare; " + OTHER_BEGINNINGS,
        )
    if text.alike > ALIKE:
        yield _finding(
            "uniform_text",
            "warning",
            f"{text.alike:.0%} of the {text.documents:,} documents that the teacher wrote begin with the same words: "
            "they are of one kind, and what they lack may be forgotten",
            OTHER_BEGINNINGS,
        )
    if text.empty > EMPTY:
        yield _finding(
            "empty_text",
            "warning",
            f"{text.empty:.0%} of the {text.documents:,} documents that the teacher wrote are empty: it ended them at "
            "once",
            OTHER_BEGINNINGS,
        )
    if text.ended < ENDED:
        yield _finding(
            "endless_text",
            "note",
            f"the teacher ended only {text.ended:.0%} of the {text.documents:,} documents that it wrote: the others "
            "were cut at distill.sequence_length",
            "raise distill.sequence_length if longer documents matter; a model without an end of text never ends one",
        )


def _finding(check: str, severity: str, message: str, hint: str) -> Finding:
    return Finding.model_validate(
        {"check": check, "severity": severity, "round": None, "message": message, "hint": hint}
    )
