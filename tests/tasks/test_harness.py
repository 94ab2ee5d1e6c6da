"""Scores through lm-evaluation-harness: its own model class gives the same, for every removal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import score_tasks
from tests.families import save_tiny, tiny_tokenizer
from tests.tasks.conftest import input_error, task_of

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [{"q": f"w{5 + i} w{9 + i} w7", "a": f"w{4 + i}", "b": f"w{20 + i} w3", "gold": i % 2} for i in range(12)]
KINDS: dict[str, dict[str, Any]] = {
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{[a, b]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "shown": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "num_fewshot": 3,
        "doc_to_choice": "{{[a, b]}}",
        "metric_list": [{"metric": "acc"}],
        "fewshot_split": "train",
    },
    "continued": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{b}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolled": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{(q + ' ' + a + ' ') * 20}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["w8 "], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task a kind, and a group of two."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(data)}},
        "validation_split": "train",
    }
    for name, kind in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | kind))
    for name, weighted in (("both", True), ("halves", False)):
        group = {
            "group": name,
            "task": ["chosen", "shown"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": weighted}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return tmp_path


def harness_results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, folder: Path, **options: Any
) -> Any:
    """The results of the harness with its own model class."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    return results["results"][task]


def scores_of(model: PreTrainedModel, tokenizer: Any, task: Task, candidates: list[int]) -> list[Any]:
    task.check()
    return [scores[task.name] for scores in score_tasks(Engine(LayerwiseModel(model), tokenizer, candidates), [task])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("chosen", "acc"),
        ("chosen", "acc_norm"),
        ("shown", "acc"),
        ("continued", "perplexity"),
        ("continued", "acc"),
        ("rolled", "word_perplexity"),
        ("rolled", "bits_per_byte"),
        ("written", "exact_match"),
        ("both", "acc"),
        ("halves", "acc"),
    ],
)
def test_every_kind_of_task_scores_as_the_harness_does(tiny: Any, folder: Path, name: str, metric: str) -> None:
    model, tokenizer = tiny
    task = task_of(kind="harness", name="t", task=name, include_path=str(folder), metric=metric)
    for score, removed in zip(scores_of(model, tokenizer, task, [1, 3]), ([], [1], [3]), strict=True):
        results = harness_results(remove_layers(copy.deepcopy(model), removed), tokenizer, name, folder)
        assert score.value == pytest.approx(results[f"{metric},none"], rel=1e-5)
        assert score.n == (24 if name in ("both", "halves") else 12)


@pytest.mark.slow
def test_zorro_and_next_sentence_are_the_harnesss_for_every_removal(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(kit / "models/stories260K-hf")
    folder = kit / "eval" / "lm_eval"
    for name in ("zorro_quantifiers-superlative", "zorro_irregular-verb", "next_sentence_en"):
        task = task_of(kind="harness", name="t", task=name, include_path=str(folder), limit=15)
        candidates = list(range(5))
        for score, removed in zip(
            scores_of(model, tokenizer, task, candidates), ([], *([c] for c in candidates)), strict=True
        ):
            shorter = remove_layers(copy.deepcopy(model), removed)
            assert score.value == harness_results(shorter, tokenizer, name, folder, limit=15)["acc,none"]


def test_paired_errors_need_samples(tiny: Any, folder: Path) -> None:
    model, tokenizer = tiny
    for name, metric, apart in (("both", "acc", True), ("continued", "perplexity", False)):
        task = task_of(kind="harness", name="t", task=name, include_path=str(folder), metric=metric)
        (score,) = scores_of(model, tokenizer, task, [])
        assert (score.influences is not None) == apart
        assert score.stderr > 0


@pytest.mark.slow
def test_what_is_said_of_harness_tasks(folder: Path) -> None:
    def of(**options: Any) -> tuple[str, str]:
        return input_error(task_of(**({"kind": "harness", "name": "t", "include_path": str(folder)} | options)).check)

    message, hint = of(task="chosn")
    assert message.startswith("task t: chosn: lm-evaluation-harness knows no such task; did you mean chosen")
    assert "lm-eval ls tasks" in hint
    message, hint = of(task="chosen", metric="f1")
    assert (message, hint) == ("task t: chosen: chosen has no metric 'f1'", "it has acc, acc_norm")
    assert of(task="chosen", filter="strict") == ("task t: chosen: chosen has no filter 'strict'", "it has none")
    broken = yaml.safe_load((folder / "chosen.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["train"] = str(folder / "absent.jsonl")
    (folder / "gone.yaml").write_text(yaml.safe_dump(broken | {"task": "gone"}))
    message, hint = of(task=str(folder / "gone.yaml"), include_path=None)
    assert (
        message.startswith(f"task t: {folder / 'gone.yaml'}: its data or definition cannot be loaded (")
        and "absent.jsonl" in message
    )
    drawn = KINDS["written"] | {"generation_kwargs": {"until": ["w8"], "do_sample": True, "temperature": 1.0}}
    (folder / "drawn.yaml").write_text(
        yaml.safe_dump(
            {k: v for k, v in broken.items() if k.startswith(("dataset", "valid"))}
            | drawn
            | {"task": "drawn", "dataset_kwargs": {"data_files": {"train": str(folder / "rows.jsonl")}}}
        )
    )
    assert (
        of(task=str(folder / "drawn.yaml"))[0]
        == f"task t: {folder / 'drawn.yaml'}: drawn draws samples (do_sample: True, temperature: 1.0); "
        "answers here are greedy"
    )


def test_chat_templates_are_applied(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w50 {{ m['content'] }} w51 {% endfor %}"
    task = task_of(kind="harness", name="t", task="chosen", include_path=str(folder), apply_chat_template=True, limit=1)
    (sample,) = task.samples(tokenizer)
    first, _ = sample.requests
    assert tokenizer.decode(first.context).split() == ["w50", "w5", "w9", "w7", "w51"]
