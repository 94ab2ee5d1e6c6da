"""Runs whose text the teacher writes: without any corpus, resumed as uninterrupted, with its signs and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.config.distill import DistillConfig
from layerpeel.config.fields import TeacherTextConfig
from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.data.token_documents import find_token_text, write_documents
from layerpeel.errors import InputError
from layerpeel.inference import teacher_text
from layerpeel.report.gather import costs_of
from layerpeel.report.page import write_report
from layerpeel.run.card import card_facts, card_metadata
from layerpeel.run.events import TeacherText
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.preflight import check_score
from layerpeel.run.text_health import degenerate_text
from layerpeel.training.rounds import distill
from layerpeel.training.trainer import Trainer
from tests.families import save_texts, save_tiny, tiny_model, tiny_texts, tiny_tokenizer
from tests.run.test_loop import numbers


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run of a tiny teacher from 6 layers to 4, on nothing but what the teacher writes."""
    held = str(save_texts(tmp_path / "held.jsonl"))
    return {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "run"),
        "stop": {"target_layers": 4},
        "score": {"decide": "teacher_kl", "tokens": 64},
        "tasks": [{"kind": "perplexity", "data": held, "limit": 5}],
        "distill": {
            "text": {"from": "teacher"},
            "tokens_per_round": 512,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "repair": False,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "save_every": 0,
        },
    }


def config_of(settings: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(settings | changes, "test")


class Killed(BaseException):
    pass


def test_a_run_needs_no_corpus_and_goes_on_where_it_was_killed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = peel(config_of(settings))
    (text,) = whole.teacher_texts
    assert len(whole.rounds) == 2 and all(each.training.tokens > 0 for each in whole.rounds)
    assert 1024 <= text.tokens < 1024 + 16  # what both rounds train on
    assert [event.event for event in whole.events][:3] == ["start", "teacher", "teacher_text"]
    marker = find_token_text(whole.folder / text.folder)
    assert marker and marker.documents == text.documents and len(text.samples) == 4

    def write_and_die(calls: int) -> Any:
        left = [calls]

        def write(*arguments: Any) -> str:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return write_documents(*arguments)

        return write

    changed = config_of(settings, output=str(tmp_path / "broken"))
    for calls in (1, 2):  # mid-way through the text, twice
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(teacher_text, "write_documents", write_and_die(calls))
            peel(changed)
        assert Run(changed.output).teacher_texts == []
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and in the first training
        note, steps = Trainer._note, []

        def noted(self: Trainer, *arguments: Any) -> None:
            note(self, *arguments)
            steps.append(1)
            if len(steps) == 4:
                raise Killed

        patch.setattr(Trainer, "_note", noted)
        peel(changed)
    again = peel(changed)
    assert numbers(again) == numbers(whole)
    for path in (whole.folder / text.folder).glob("*.safetensors"):
        assert (again.folder / text.folder / path.name).read_bytes() == path.read_bytes()
    assert len(again.teacher_texts) == 1  # recorded once


def test_another_wish_for_text_is_another_run(settings: dict[str, Any]) -> None:
    peel(config_of(settings))
    settings["distill"]["text"] = {"from": "teacher", "temperature": 0.5}
    with pytest.raises(InputError, match=r"distill\.text"):
        peel(config_of(settings))


def test_the_report_and_the_card_say_what_the_teacher_wrote(
    settings: dict[str, Any], tmp_path: Path, quick_measuring: None
) -> None:
    settings["distill"]["text"] = [str(tmp_path / "held.jsonl"), {"from": "teacher", "tokens": 600}]
    run = peel(config_of(settings))
    (text,) = run.teacher_texts
    assert text.tokens >= 600
    run.events[run.events.index(text)] = text.model_copy(update={"samples": ["<script>alert(1)</script>\u202e", "w9"]})
    page = write_report(run, measure=True).read_text()
    assert costs_of(run).text_seconds == text.tokens / text.tokens_per_second < costs_of(run).seconds
    assert "the teacher&#39;s text" in page.split("time spent")[1].split("</div>")[0].replace("'", "&#39;")
    assert "Text that the teacher wrote" in page and text.folder in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page and "<script>alert(1)" not in page
    facts = card_facts(run, 2, card_metadata(run.config), None)
    assert facts["sources"] == ["held.jsonl", "text that the teacher wrote"]


def test_samples_of_the_report_begin_as_the_teachers_text_where_there_is_no_other(
    settings: dict[str, Any], quick_measuring: None
) -> None:
    run = peel(config_of(settings))
    page = write_report(run, measure=True).read_text()
    assert page.count("<h3>text</h3>") == 2


def test_the_python_function_needs_no_corpus_either() -> None:
    config = DistillConfig(
        text=[TeacherTextConfig()], tokens_per_round=128, sequence_length=16, batch_size=4, repair=False
    )
    student, result = distill(tiny_model("llama"), tiny_tokenizer(), [2], config)
    assert result.tokens > 0 and student.config.num_hidden_layers == 5


def test_a_streamed_teacher_writes_no_text(settings: dict[str, Any]) -> None:
    settings["score"] |= {"weights": "stream", "text": {"from": "teacher"}}
    with pytest.raises(InputError, match=r"score\.weights: stream reads every layer from disk for every token"):
        check_score(config_of(settings))


def test_prompts_are_looked_at_before_any_weights_are(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["distill"]["text"] = {"from": "teacher", "prompts": str(tmp_path / "none.jsonl")}
    with pytest.raises(InputError, match=r"no such file: .*none\.jsonl"):
        peel(config_of(settings))
    assert not (tmp_path / "run").exists()
    path = save_texts(tmp_path / "prompts.jsonl", tiny_texts([5, 8, 3]))
    settings["distill"]["text"] = {"from": "teacher", "prompts": str(path)}
    peel(config_of(settings))
    moved = tmp_path / "moved.jsonl"
    path.rename(moved)
    settings["distill"]["text"]["prompts"] = str(moved)
    assert peel(config_of(settings)).finish  # another place of the same prompts
    save_texts(moved, ["w5 w6", "w7"])
    with pytest.raises(InputError, match=r"distill\.text\.0: the text in .* is another than when"):
        peel(config_of(settings))


HEALTHY = {"documents": 100, "tokens": 5000, "tokens_per_second": 9.0, "ended": 0.6, "empty": 0.0, "looping": 0.01}


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ({}, []),
        ({"looping": 0.3}, [("looping_text", "warning", "30% of the 100 documents that the teacher wrote repeat")]),
        ({"alike": 0.7}, [("uniform_text", "warning", "70% of the 100 documents that the teacher wrote begin with")]),
        ({"empty": 0.9}, [("empty_text", "warning", "90% of the 100 documents that the teacher wrote are empty")]),
        ({"ended": 0.0}, [("endless_text", "note", "the teacher ended only 0% of the 100 documents")]),
        ({"looping": 0.3, "documents": 3}, []),
    ],
)
def test_signs_of_degenerate_text_are_found(
    settings: dict[str, Any], signs: dict[str, float], expected: list[tuple[str, str, str]]
) -> None:
    event = TeacherText.model_validate({"folder": "text/a", "samples": [], "alike": 0.05, **HEALTHY, **signs})
    run = Run.__new__(Run)
    run.events = [event]
    findings = list(degenerate_text(run))
    assert [(each.check, each.severity) for each in findings] == [each[:2] for each in expected]
    assert all(each.message.startswith(text) for each, (_, _, text) in zip(findings, expected, strict=True))
    assert all(each.hint and each.round is None for each in findings)


def test_a_teacher_that_repeats_itself_is_found_in_a_real_run(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        for token in range(64):  # after a token comes the one before it in a cycle of four
            model.lm_head.weight[4 + token % 4] += 9 * model.model.embed_tokens.weight[token]
    model.save_pretrained(tmp_path / "teacher")
    settings["distill"] |= {"sequence_length": 40, "text": {"from": "teacher", "tokens": 2000}}
    run = peel(config_of(settings))
    assert "looping_text" in [finding.check for finding in run.findings]
