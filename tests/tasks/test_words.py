"""Words of every script, and the metrics that count them."""

from __future__ import annotations

import pytest

from layerpeel.tasks.generate import text_score
from layerpeel.tasks.words import chunks, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, it's 3.5 %", ["don", "t", "stop", "it", "s", "3", "5"]),
        ("Ёлка растёт", ["ёлка", "растёт"]),
        ("मैं हिंदी पढ़ता हूँ।", ["मैं", "हिंदी", "पढ़ता", "हूँ"]),
        ("我爱北京。", ["我", "爱", "北", "京"]),
        ("GPT在北京", ["gpt", "在", "北", "京"]),
        ("ที่นี่", ["ที่", "นี่"]),  # characters with their marks
        ("كِتَابٌ جديد", ["كِتَابٌ", "جديد"]),
        ("cafe\u0301", ["café"]),
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_what_stands_between_spaces_keeps_case_and_punctuation() -> None:
    assert chunks("Don't stop, A.") == ["Don't", "stop,", "A."]
    assert chunks("我爱, b") == ["我", "爱", ",", "b"]


@pytest.mark.parametrize(
    ("metric", "text", "target", "expected"),
    [
        ("rougeL", "the cat sat", "the cat sat", 1.0),
        ("rougeL", "the cat", "the cat sat down", 2 * 1.0 * 0.5 / 1.5),
        ("rougeL", "हिंदी", "हिंदु", 0.0),  # another vowel sign is another word
        ("rougeL", "我爱北京天安门", "我爱北京天安们", 6 / 7),
        ("rouge1", "нет", "да", 0.0),
        ("copy", "a b c d", "a b c", 0.75),
        ("copy", "我爱北京", "我爱北海", 0.75),
        ("exact", "я", "я", 1.0),
    ],
)
def test_metrics_by_hand(metric: str, text: str, target: str, expected: float) -> None:
    assert text_score(metric, text, target) == pytest.approx(expected)
