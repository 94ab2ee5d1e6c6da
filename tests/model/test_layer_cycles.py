"""Removals that break a cycle of layers which other runtimes take as fixed are said, or refused on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerpeel.cli.removal import removal_lines
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.families import FAMILIES
from layerpeel.model.layer_cycles import CYCLES, broken_cycle, cycle_breakers, keeps_cycle, out_of_cycle
from layerpeel.model.loading import load_config_of
from layerpeel.model.removal import remove_from_files
from layerpeel.run.preflight import check
from layerpeel.run.removal_card import write_removal_card
from layerpeel.run.teacher_checks import note_cycle
from tests.families import save_texts, tiny_config, tiny_model, tiny_tokenizer

GEMMA = {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2, "num_hidden_layers": 12}


def test_all_families_with_a_cycle_are_known() -> None:
    assert CYCLES.keys() <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("removed", "whole"),
    [
        (range(6), True),
        (range(3, 9), True),
        (range(6, 12), True),
        ([11], True),
        ([9, 10, 11], True),
        ([3, 4], False),
        ([0], False),
        ([5], False),
        (range(5), False),
    ],
)
def test_a_whole_period_of_gemma3_or_its_end_can_go(removed: Any, whole: bool) -> None:
    config = tiny_config("gemma3_text", **GEMMA)
    kept = [layer for layer in range(12) if layer not in removed]
    assert keeps_cycle(config, kept) is whole
    said = broken_cycle(config, kept)
    if whole:
        assert said is None
    else:
        assert said and "the cycle of 6 layers that llama.cpp and mlx-lm take as fixed for gemma3_text" in said
        assert "in transformers and vLLM, CTranslate2 it is right" in said
    assert cycle_breakers(config).keys() == set(range(11))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 4, "num_hidden_layers": 8}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 4, "num_hidden_layers": 8}),
        ("cohere2", {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2, "num_hidden_layers": 8}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 2, "num_hidden_layers": 8}),
    ],
)
def test_other_cycles(family: str, fields: dict[str, Any]) -> None:
    config = tiny_config(family, **fields)
    assert broken_cycle(config, [0, 1, 2, 3]) is None
    said = broken_cycle(config, [0, 2, 3, 4, 5, 6, 7])
    assert said and "llama.cpp" in said and "(by its source)" in said


def test_families_without_a_cycle_have_none_to_break() -> None:
    for config in (tiny_config("llama"), tiny_config("gemma3_text")):  # the second in an order of its own
        assert broken_cycle(config) is None and cycle_breakers(config) == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("gemma3_text", **GEMMA).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_remove_says_it_and_so_does_the_card(folder: Path, tmp_path: Path) -> None:
    for layers, broken in (([3, 4], True), (list(range(3, 9)), False)):
        student = tmp_path / f"student{len(layers)}"
        removal = remove_from_files(folder, layers, student)
        write_removal_card(student, str(folder), removal.layers, 1, 2, cycle=removal.broken_cycle)
        said = [line for line in removal_lines(removal, student) if line.startswith("note ")]
        assert bool(said) is broken is ("take as fixed" in (student / "README.md").read_text())
        assert bool(out_of_cycle(load_config_of(student))) is broken


def settings(folder: Path, **protect: Any) -> RunConfig:
    text = save_texts(folder.parent / "text.jsonl")
    fields = {
        "teacher": str(folder),
        "output": str(folder.parent / "run"),
        "stop": {"min_quality": 0.5},
        "tasks": [{"kind": "perplexity", "data": str(text)}],
        "score": {"decide": "teacher_kl", "text": str(text), "protect": protect},
        "distill": {"sequence_length": 64, "tokens_per_round": 0},
    }
    return RunConfig.model_validate(json.loads(json.dumps(fields)))


def test_a_run_says_it_before_it_begins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_cycle(settings(folder), load_config_of(folder))
    assert "removing single layers breaks the cycle of 6 layers" in capsys.readouterr().err
    note_cycle(settings(folder, pattern=True), load_config_of(folder))
    assert capsys.readouterr().err == ""


def test_a_pattern_that_no_single_layer_keeps_is_refused_with_what_can_be_done(folder: Path) -> None:
    with pytest.raises(InputError, match="a cycle of 6, which breaks without any single layer") as caught:
        check(settings(folder, pattern=True))
    said = str(caught.value.hint)
    assert "layerpeel remove --layers 6-11" in said and "score.protect.last: 0" in said
    assert "score.protect.pattern: false), which only llama.cpp and mlx-lm cannot read" in said
    check(settings(folder, pattern=True, last=0))
