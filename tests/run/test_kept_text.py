"""A run reads its text once: later rounds and resumes take the token ids that are there, and give the same numbers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.data import token_store, tokenizing
from layerpeel.data.documents import PlacedDocument
from layerpeel.data.token_documents import write_documents
from layerpeel.data.token_store import TokenStore
from layerpeel.errors import InputError, RunError
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.peeling import Peeling
from tests.families import save_texts, save_tiny, tiny_texts
from tests.run.test_loop import numbers


class Killed(BaseException):
    pass


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run of a tiny teacher from 6 layers to 4, with repair, training, a trial of candidates and a last pass."""
    text = str(save_texts(tmp_path / "text.jsonl", tiny_texts(5 + 7 * line % 23 for line in range(400))))
    return {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "run"),
        "stop": {"target_layers": 4},
        "score": {"decide": "teacher_kl", "tokens": 64, "heal": {"keep": 2, "steps": 1}},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 5}],
        "distill": {
            "text": text,
            "tokens_per_round": 256,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "repair": {"tokens": 128},
            "last_pass": {"tokens": 128},
        },
    }


def config_of(settings: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(settings | changes, "test")


def no_text(*_: Any) -> Iterator[PlacedDocument]:
    raise AssertionError("text is read")


def anew(*arguments: Any) -> Callable[[], Iterator[Any]]:
    """Reads and tokenises text each time, as if nothing were kept."""
    return lambda: tokenizing.read_tokens(*arguments[1:4])


def test_later_rounds_and_resumes_read_no_text(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "reader", anew)
        expected = peel(config_of(settings, output=str(tmp_path / "anew")))
    config, record = config_of(settings), Peeling.record

    def dies(peeling: Peeling, *arguments: Any) -> None:
        record(peeling, *arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Peeling, "record", dies)
        patch.setattr("layerpeel.run.peeling.heal_candidates", _reading_no_text(patch))
        peel(config)
    assert len(Run(config.output).rounds) == 1
    assert len(list((config.output / "text").glob("tokens-*"))) == 1
    (config.output / "text/tokens-old").mkdir()  # of a text that is no longer the run's
    monkeypatch.setattr(tokenizing, "mix_documents", no_text)
    resumed = peel(config)
    assert numbers(resumed) == numbers(expected) and len(resumed.rounds) == 2
    assert resumed.finish and expected.finish and resumed.finish.last_pass and expected.finish.last_pass
    assert resumed.finish.last_pass.evaluation == expected.finish.last_pass.evaluation
    assert not (config.output / "text").exists()  # a finished run needs it no more


def _reading_no_text(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The trial of candidates, from which on all text has to be there."""
    from layerpeel.run.heal import heal_candidates

    def heal(*arguments: Any) -> None:
        patch.setattr(tokenizing, "mix_documents", no_text)
        heal_candidates(*arguments)

    return heal


def test_a_run_without_a_target_reads_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"stop": {"min_quality": 1e-6}}
    settings["distill"] |= {"last_pass": None, "repair": False}
    settings["score"] |= {"heal": None, "protect": {"first": 2, "last": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "reader", anew)
        expected = peel(config_of(settings, output=str(tmp_path / "anew")))
    run = peel(config_of(settings))
    assert numbers(run) == numbers(expected) and len(run.rounds) == 3


def test_a_full_disk_is_named_and_nothing_is_lost(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(settings)
    monkeypatch.setattr(token_store, "SHARD", 200)
    calls = []

    def full(path: Path, documents: Any) -> str:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_documents(path, documents)

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "write_documents", full)
        with pytest.raises(RunError, match="no space left on the disk of") as error:
            peel(config)
    assert "run the same command again" in str(error.value.hint)
    first, second = (path.stat().st_mtime_ns for path in calls[:2])
    written: list[Path] = []

    def write(path: Path, documents: Any) -> str:
        written.append(path)
        return write_documents(path, documents)

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "write_documents", write)
        patch.setattr(TokenStore, "clear", lambda texts: None)
        assert peel(config).finish
    assert written and not {*calls[:2]} & {*written}
    assert [first, second] == [path.stat().st_mtime_ns for path in calls[:2]]


def test_text_that_cannot_be_read_leaves_no_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "SHARD", 200)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    settings["distill"] |= {"tokens_per_round": 100_000}
    with pytest.raises(InputError, match="line 401: column 'text' holds int"):
        peel(config_of(settings))
    assert not (tmp_path / "run").exists()
