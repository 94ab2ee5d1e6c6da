"""What a first config measures on: text held out of the user's, or written by the teacher, and tasks of the harness."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import RunConfig, TaskConfig
from layerpeel.data.documents import read_documents
from layerpeel.errors import InputError
from layerpeel.plan import quality
from layerpeel.plan.quality import (
    CHARACTERS,
    HELD_OUT,
    NOT_THE_RUNS_SEED,
    harness_measures,
    held_out_fields,
    held_out_texts,
    hold_out_every,
    sampled_texts,
    text_measure,
    write_texts,
)
from layerpeel.tasks.registry import make_tasks
from tests.families import save_texts, tiny_texts, tiny_tokenizer


@pytest.mark.parametrize(("documents", "every"), [(2, 10), (10, 10), (640, 10), (641, 11), (6400, 64)])
def test_how_many_documents_are_held_out(documents: int, every: int, tmp_path: Path) -> None:
    text = save_texts(tmp_path / "text.jsonl", [f"w{number}" for number in range(documents)])
    assert hold_out_every(str(text)) == every
    held = held_out_texts(TextConfig(path=str(text), hold_out=every), tiny_tokenizer())
    trained = list(read_documents(TextConfig(path=str(text), hold_out=every)))
    assert 1 <= len(held) <= HELD_OUT and len(trained) >= 1
    assert not {*held} & {*trained}
    assert held == [f"w{number}" for number in range(0, documents, every)][:HELD_OUT]


def test_held_out_documents_are_cut_and_chats_are_written(tmp_path: Path) -> None:
    book = save_texts(tmp_path / "books.jsonl", ["w5 " * CHARACTERS] * 2)
    assert [*map(len, held_out_texts(TextConfig(path=str(book), hold_out=2), tiny_tokenizer()))] == [CHARACTERS]
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "w7"}]}\n' * 2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    assert held_out_texts(TextConfig(path=str(chats), hold_out=2), tokenizer) == ["[user] w7"]


def test_a_single_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("w5 w7")
    with pytest.raises(InputError) as caught:
        hold_out_every(str(tmp_path / "book.txt"))
    assert str(caught.value) == (
        f"--text {tmp_path / 'book.txt'}: it holds one document, and one has to be held out to measure on"
    )
    assert caught.value.hint == (
        "in a .txt file, a line <|endoftext|> ends a document; or give a folder of several files"
    )


def settings(teacher: Path) -> RunConfig:
    return RunConfig(
        teacher=str(teacher),
        output=Path("none"),
        tasks=[TaskConfig(kind="perplexity")],
        distill={"text": {"from": "teacher"}, "sequence_length": 32},  # type: ignore[arg-type]
    )


def test_the_teachers_held_out_text_is_of_a_seed_that_no_run_has(teacher: Path) -> None:
    texts = sampled_texts(settings(teacher), 6)
    assert texts == sampled_texts(settings(teacher), 6) and len({*texts}) > 1
    with pytest.raises(ValueError, match="less than 4294967296"):
        settings(teacher).model_validate({**settings(teacher).model_dump(), "seed": NOT_THE_RUNS_SEED})


def test_a_teacher_that_writes_nothing_is_refused(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.Sampler, "sample", lambda self, beginnings, numbers, advance: [[1, 2]] * len(numbers))
    with pytest.raises(InputError) as caught:
        sampled_texts(settings(teacher), 2)
    assert (
        str(caught.value) == f"{teacher}: it writes nothing by itself, so there is no text to heal and to measure it on"
    )
    assert caught.value.hint == "give text: --text FOLDER"


def test_the_requests_are_those_of_the_file(tmp_path: Path) -> None:
    fields, texts = held_out_fields(str(tmp_path / "held.jsonl"), 16), tiny_texts([40, 5])
    measure = text_measure(fields, texts, tiny_tokenizer())
    write_texts(tmp_path / "held.jsonl", texts)
    (task,) = make_tasks([TaskConfig.model_validate(fields)])
    assert measure.first(2) == task.requests(tiny_tokenizer())
    assert [len(sample) for sample in measure.requests] == [3, 1] and measure.first(1) == [*measure.requests[0]]
    assert "sequence_length" not in held_out_fields("held.jsonl", 1024)


@pytest.mark.slow
def test_harness_tasks_fit_the_models_size(local_tasks: list[str]) -> None:
    measures, missing = harness_measures(999, tiny_tokenizer())
    assert missing is None and [measure.fields["task"] for measure in measures] == local_tasks[:1]
    assert [len(sample) for sample in measures[0].requests] == [2, 2, 2]
    measures, missing = harness_measures(1000, tiny_tokenizer())
    assert missing is None and len(measures) == 2


@pytest.mark.slow
def test_harness_tasks_that_cannot_be_had_are_left_out(local_tasks: list[str]) -> None:
    Path(local_tasks[1]).unlink()
    measures, missing = harness_measures(1000, tiny_tokenizer())
    assert len(measures) == 1 and missing and missing.startswith(f"task {local_tasks[1]}: {local_tasks[1]}: ")


def test_without_the_harness_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = "lm-evaluation-harness is not installed (pip install 'layerpeel[eval]')"
    assert harness_measures(10**9, tiny_tokenizer()) == ([], said)
