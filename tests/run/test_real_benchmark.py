"""The benchmark on a published model: every way is a config with the same tokens, and differences are paired."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("real")


def options_of(real: Any, tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 30}', encoding="utf-8")
    return argparse.Namespace(teacher=tmp_path, config=real.CONFIG, depths=[27, 24], tokens=300_000)


def test_every_way_of_ours_is_a_config_with_the_same_tokens(real: Any, tmp_path: Path) -> None:
    options = options_of(real, tmp_path)
    for name, way in real.WAYS.items():
        settings = real.settings_of(name, 0, options)
        assert str(ROOT.parent) not in json.dumps(settings)
        if way.kind in ("loop", "one_shot"):
            config = real.config_of(way, 0, options)
            assert config.stop.target_layers == 24
            assert config.distill.tokens_per_round * 6 == (300_000 if way.trains else 0)
    paper = real.config_of(real.WAYS["paper"], 0, options).distill
    assert (paper.train, paper.repair, paper.tokens_per_step) == ("neighbours", False, 2_048)
    assert paper.losses["kl"].model_extra["reduction"] == "sum/100"


def row(way: str, layers: int, answers: list[int], kl: float, tokens: int = 300_000) -> dict[str, Any]:
    value = sum(answers) / len(answers) / 100
    score = {"value": value, "stderr": 0.1, "chance": 0.25, "rows": answers}
    return {
        "way": way,
        "layers": layers,
        "tokens": tokens if way != "teacher" else 0,
        "scores": {"a": score, "b": score},
        "kl": {"web": kl, "wiki": 3 * kl},
        "minutes": 61.2,
        "peak_gib": 2.5,
        "trained_on": 300_000,
    }


def test_what_is_kept_above_chance_and_its_paired_error(real: Any) -> None:
    teacher, student = row("teacher", 30, [100, 100, 100, 0], 0.0), row("default", 24, [100, 0, 100, 0], 0.2)
    table = real.markdown([teacher, student])
    # (0.5 - 0.25) / (0.75 - 0.25); differences 0, 1, 0, 0 have a variance of 0.25, and of two tasks' mean
    # the error is sqrt(2 * 0.25 / 4) / 2 = 0.1768, over 0.5
    assert "| 24 | layerpeel | 0.500 | 0.500 | 50.0 ± 35.4 | 0.200 | 0.600 | 0.400 | 300,000 | 0 | 61 | 2.50 |" in table
    assert "| 30 | teacher | 0.750 | 0.750 | 100.0 | 0.000 | 0.000 | 0.000 |" in table


def test_differences_are_paired_row_by_row(real: Any) -> None:
    teacher, peer = row("teacher", 30, [100, 100, 100, 0], 0.0), row("trl-gkd", 24, [100, 0, 100, 0], 0.4)
    ours = row("default", 24, [100, 100, 100, 0], 0.2)
    lines = real.differences([teacher, ours, peer]).splitlines()
    assert lines[0] == "| ahead of | layerpeel |"
    # 0.75 - 0.5 over 0.5; the error is that of the test above
    assert lines[2:] == ["| layerpeel |  |", f"| {real.WAYS['trl-gkd'].title} | +50.0 ± 35.4 |"]


def test_the_closest_to_the_teacher_at_each_depth_comes_first(real: Any) -> None:
    rows = [row("teacher", 30, [100, 0], 0.0), row("paper", 24, [0, 100], 0.4), row("default", 24, [100, 0], 0.2)]
    rows += [row("loop-untrained", 27, [100, 100], 0.5), row("default", 24, [100, 0], 0.1, 1_000_000)]
    titles = [line.split("|")[2].strip() for line in real.markdown(rows).splitlines()[2:]]
    untrained, ours, paper = (real.WAYS[way].title for way in ("loop-untrained", "default", "paper"))
    assert titles == ["teacher", untrained, f"{ours}, 1,000,000 tokens", ours, paper]
    first, second = real.brief(rows).splitlines()[2:]
    assert first == f"| {ours} | 100.0 ± 0.0 | 0.400 | 61 | 2.5 |" and paper in second
    left, right = real.draw(rows).axes
    assert [bar.get_width() for bar in left.patches] == [100, 100]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.4, 0.8])
    assert [label.get_text() for label in left.get_yticklabels()] == [ours, paper]
