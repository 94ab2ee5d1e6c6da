"""Which choice is right: one rule for all rows of a column."""

from __future__ import annotations

from typing import Any

import pytest

from layerpeel.tasks.answer_reading import AnswerReading

WORDS = ["Mars", "Venus", "Earth", "Moon"]


def read(*answers: Any, choices: list[str] = WORDS) -> list[int | None]:
    reading = AnswerReading.of([(choices, answer) for answer in answers])
    return [reading.read(choices, answer) for answer in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["A", "B", "1", "4", "2"], [0, 1, 0, 3, 1]),  # ARC: some rows are labelled 1 to 4, most A to D
        (["4", "D"], [3, 3]),
        (["0", "1", "3"], [0, 1, 3]),
        ([0, 1, 3], [0, 1, 3]),
        (["Earth", "Mars"], [2, 0]),
    ],
)
def test_labels_are_read_by_one_rule_for_the_column(answers: list[Any], expected: list[int]) -> None:
    assert read(*answers) == expected


@pytest.mark.parametrize(
    "answers", [["A", "5"], ["A", "0"], ["A", 1], ["A", True], ["A", "a"], ["1", "2", "4"], [None]]
)
def test_a_label_that_the_rule_does_not_read_is_none(answers: list[Any]) -> None:
    assert None in read(*answers)


def test_choices_that_are_letters_are_their_own_labels() -> None:
    assert read("B", "A", choices=["B", "A"]) == [0, 1]


def test_numbers_that_are_both_a_choice_and_an_index_are_refused() -> None:
    reading = AnswerReading.of([(["1", "0", "2"], "1")])
    assert reading.read(["1", "0", "2"], "1") is None
    assert reading.note == ", and both its index and its text could be meant"
    assert read("2", "0", choices=["0", "1", "2"]) == [2, 0]  # the two are the same
    assert read(1, 0, choices=["1", "0"]) == [1, 0]  # a number is an index
