"""How a column says which choice is right: by text, letter or index, the same for all of its rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Reader = Callable[[Sequence[str], Any], int | None]


def by_text(choices: Sequence[str], answer: Any) -> int | None:
    return choices.index(answer) if isinstance(answer, str) and answer in choices else None


def by_letter(choices: Sequence[str], answer: Any) -> int | None:
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    return letters.index(answer) if answer in letters else None


def by_index(choices: Sequence[str], answer: Any) -> int | None:
    """From 0, as a number or as text."""
    if isinstance(answer, str) and re.fullmatch("[0-9]{1,9}", answer):
        answer = int(answer)
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    return answer if is_number and 0 <= answer < len(choices) else None


def by_label(choices: Sequence[str], answer: Any) -> int | None:
    """A letter, or a number from 1: some rows of ARC are labelled 1 to 4, the others A to D."""
    letter = by_letter(choices, answer)
    if letter is not None:
        return letter
    number = by_index(["", *choices], answer) if isinstance(answer, str) else None
    return number - 1 if number else None


READERS: dict[str, Reader] = {"text": by_text, "letter": by_letter, "index": by_index, "label": by_label}


@dataclass(frozen=True)
class AnswerReading:
    """One rule for a column.

    Attributes:
        read: gives the index of the right choice, or None if a row does not follow the rule.
        note: what else there is to say of a row that does not.
    """

    read: Reader
    note: str = ""

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[str], Any]]) -> AnswerReading:
        """The rule that reads all rows; if there is none, the one that reads most of them.

        Args:
            rows: of each, its choices, and what its answer column holds.
        """
        read = {name: [reader(*row) for row in rows] for name, reader in READERS.items()}
        if not any(value is not None for value in read["letter"]):
            del read["label"]  # without a letter anywhere, numbers count from 0
        complete = [name for name in read if None not in read[name]]
        if (
            {"text", "index"} <= set(complete)
            and read["text"] != read["index"]
            and any(isinstance(a, str) for _, a in rows)
        ):
            return cls(lambda *_: None, ", and both its index and its text could be meant")
        if complete:
            return cls(READERS[complete[0]])
        most = max(read, key=lambda name: sum(value is not None for value in read[name]))
        return cls(READERS[most], f" (other rows say it by {most})" if any(v is not None for v in read[most]) else "")
