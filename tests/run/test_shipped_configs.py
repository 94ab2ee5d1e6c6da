"""The configs of published models, each run on a tiny random model of its family and depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerpeel.config.reading import load_config
from layerpeel.run.loop import peel
from tests.families import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # by config: the hub's name for the teacher, its family and its depth, and tokens of training in all
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "llama", 30, 300_000),
    "gemma3-270m": ("google/gemma-3-270m", "gemma3_text", 18, 200_000),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-Coder-0.5B", "qwen2", 24, 200_000),
}
QUICK = [
    *("distill.tokens_per_round=64", "distill.sequence_length=16", "distill.tokens_per_step=32"),
    *("distill.repair.tokens=256", "score.tokens=64", "score.shortlist.keep=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_config_runs(name: str, kit: Path, tmp_path: Path) -> None:
    hub_name, family, layers, tokens = PUBLISHED[name]
    path = ROOT / "configs" / f"{name}.yaml"
    shipped = load_config(path)
    assert shipped.teacher == hub_name and shipped.stop.target_layers is not None
    assert shipped.distill.text_tokens(layers - shipped.stop.target_layers) == tokens
    kinds = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]} if family == "gemma3_text" else {}
    kinds = {field: [kind for _ in range(layers // len(value)) for kind in value] for field, value in kinds.items()}
    sizes = {"num_hidden_layers": layers, "vocab_size": 257, "max_position_embeddings": 4096}
    tiny_model(family, **sizes, **kinds).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    places = [f"teacher={tmp_path / 'teacher'}", f"output={tmp_path / 'run'}", f"stop.target_layers={layers - 1}"]
    config = load_config(path, [*places, *QUICK])
    for task in config.tasks:
        assert Path(task.data).resolve().is_relative_to(kit.resolve())  # type: ignore[attr-defined]
        task.limit = 1  # type: ignore[attr-defined]
    run = peel(config)
    assert run.finish and run.finish.reason == "target_layers" and len(run.rounds) == 1
    assert list(run.rounds[0].end.evaluation.scores) == [task.name for task in shipped.tasks]
