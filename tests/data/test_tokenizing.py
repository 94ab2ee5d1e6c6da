"""Text to token ids in several threads: what the tokenizer itself gives, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BatchEncoding, PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.data import tokenizing
from layerpeel.data.documents import PlacedDocument
from layerpeel.data.tokenizing import mean_length, tokenize
from tests.families import save_texts, tiny_texts, tiny_tokenizer

END = 2


def documents(count: int) -> list[PlacedDocument]:
    texts = [" ".join(f"w{4 + (number * place) % 60}" for place in range(1, 40)) for number in range(count)]
    return [(str(number), text) for number, text in enumerate(texts)]


def ids(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    return [each.tolist() for each in tokenize(iter(documents(count)), tokenizer)]


def expected(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    start = tokenizing.start_tokens(tokenizer)
    return [[*start, *tokenizer.encode(text, add_special_tokens=False), END] for _, text in documents(count)]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_threads_keep_the_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7), raising=False)
    tokenizer = tiny_tokenizer()
    assert ids(tokenizer, count) == expected(tokenizer, count)


@pytest.mark.parametrize(("most", "mean"), [(10**6, (100 * 9 + 3 * 39) / 103), (20, 9.0)])
def test_the_mean_length_of_documents_is_that_of_some(
    most: int, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token that ends each; of long ones fewer are read."""
    monkeypatch.setattr("layerpeel.data.tokenizing.TOKENS_FOR_MEAN", most)
    path = save_texts(tmp_path / "text.jsonl", tiny_texts([8] * 100 + [38] * 3))
    source = TextConfig(path=str(path), shuffle=0)
    assert mean_length(source, tiny_tokenizer()) == pytest.approx(mean)


def test_truncation_and_padding_of_calls_before_are_not_those_of_text() -> None:
    tokenizer = tiny_tokenizer()
    wanted = expected(tokenizer, 3)
    tokenizer(["w5 w9 w7", "w5"], padding="max_length", truncation=True, max_length=2)
    assert ids(tokenizer, 3) == wanted


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    class Own(type(tiny_tokenizer())):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> BatchEncoding:
            encoded = super()._encode_plus(text, *args, **options)
            if isinstance(text, list):
                encoded["input_ids"] = [[*row, 9] for row in encoded["input_ids"]]
            return encoded

    plain = tiny_tokenizer()
    own = Own(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    assert ids(own, 3) == [[*row[:-1], 9, END] for row in expected(plain, 3)]
