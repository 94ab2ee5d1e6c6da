"""The benchmark of healing: variants are configs, budgets are equal, and nothing is measured twice."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from layerpeel.model.surgery import remove_layers
from tests.families import save_texts, tiny_ids, tiny_model, tiny_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def healing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("healing")


def test_every_variant_is_a_config_of_its_own(healing: Any) -> None:
    for setting in (healing.storyteller(), healing.real(Path("model"))):
        settings = [healing.settings_of(setting, variant, 1000) for variant in healing.VARIANTS.values()]
        assert all(settings.count(each) <= 3 for each in settings)  # one is the default, one is tuned, and one says so
        assert str(ROOT.parent) not in json.dumps(settings)
    paper = healing.config_of(healing.real(Path("model")), healing.VARIANTS["paper"], 1000)
    assert (paper.tokens_per_step, paper.train) == (8 * 512, "neighbours")
    assert paper.losses["kl"].model_extra["reduction"] == "sum/100"


def test_variants_train_on_equal_tokens(healing: Any, tmp_path: Path) -> None:
    text = save_texts(tmp_path / "text.jsonl", tiny_texts([15] * 400))
    setting = healing.Setting(
        teacher=tmp_path,
        removed=(3, 2),
        dtype="float32",
        tokens=0,
        text={"text": str(text), "sequence_length": 16},
        step={"rows": 2},
        rate={},
        held_out={},
        texts=0,
    )
    seen = {}
    for name in ("tuned", "in-rounds", "half-at-the-end", "at-the-end", "untrained", "repaired", "repair-alone"):
        variant, teacher = healing.VARIANTS[name], tiny_model("llama")
        config, groups = healing.config_of(setting, variant, 768), healing.groups_of(setting, variant)
        student, repairs, trainings = healing.heal(teacher, tiny_tokenizer(), groups, config, 0)
        assert len(student.model.layers) == 4
        assert len(repairs) == (0 if name in ("untrained", "tuned") else 1 + variant.one_by_one), name
        seen[name] = [training.steps for training in trainings]
    assert seen == {
        "tuned": [24],
        "in-rounds": [12, 12],
        "half-at-the-end": [6, 6, 12],
        "at-the-end": [0, 0, 24],
        "untrained": [0],
        "repaired": [24],
        "repair-alone": [0],
    }


def test_kl_is_that_of_the_formula(healing: Any) -> None:
    teacher, student = tiny_model("llama"), remove_layers(tiny_model("llama"), [2])
    texts = [tiny_ids(1, 5)[0], tiny_ids(1, 9)[0]]
    each = []
    for ids in texts:
        p, q = (model(ids[None]).logits[0].detach().double().softmax(-1) for model in (teacher, student))
        each += (p * (p / q).log()).sum(-1).tolist()
    assert len(each) == 14 and healing.mean_kl(student, teacher, texts) == pytest.approx(sum(each) / 14, rel=1e-4)


def test_what_was_measured_is_not_measured_again(
    healing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int, int]] = []
    tokens_seen = {"repaired_on": 8, "trained_on": 1234}

    def measured(script: str, *arguments: Any) -> dict[str, Any]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        name, seed, tokens = (given[part] for part in ("--worker", "--seeds", "--tokens"))
        calls.append((name, seed, tokens))
        return {"kl": {"web": 0.1 + seed, "wiki": 0.3}, "seconds": 2.0, "peak_gib": 1.0, "steps": 4} | tokens_seen

    monkeypatch.setattr(sys.modules["measuring"], "measured_apart", measured)
    out = tmp_path / "healing.json"
    arguments = ["--variants", "paper,untrained", "--tokens", "500", "--out", str(out)]
    healing.main([*arguments, "--seeds", "0"])
    healing.main([*arguments, "--seeds", "0,1"])
    assert calls == [("paper", 0, 500), ("untrained", 0, 500), ("paper", 1, 500), ("untrained", 1, 500)]
    line = (
        "| untrained | `{tokens_per_round: 0, repair: false}` | 0.600 | 0.300 | 0.4500 ± 0.2500 | 2 | 8 | 1,234 | 4 |"
    )
    assert f"{line} 2 | 1.00 |" in capsys.readouterr().out
    calls.clear()
    changed = healing.Variant({"preset": "paper", "warmup_steps": 1}, over="defaults")
    monkeypatch.setitem(healing.VARIANTS, "paper", changed)
    healing.main([*arguments, "--seeds", "0,1"])
    assert calls == [("paper", 0, 500), ("paper", 1, 500)]
    runs = json.loads(out.read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(n, s) for n in ("untrained", "paper") for s in (0, 1)]
    with pytest.raises(SystemExit):
        healing.main(["--variants", "papers"])
    assert "no variant papers; there are untrained, repair-alone," in " ".join(capsys.readouterr().err.split())
