"""A run whose layers stay on the disk gives what a run in memory gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from layerpeel.config.reading import parse_config
from layerpeel.errors import InputError
from layerpeel.export.student import export_student
from layerpeel.model.loading import load_model
from layerpeel.report.measure import measurements
from layerpeel.report.measurements import NotMeasured
from layerpeel.run import peeling
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.peeling import Peeling
from layerpeel.run.results_json import evaluation_to_json
from layerpeel.study.writing import run_study
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from tests.cli.test_cli import call
from tests.families import save_texts, tiny_tokenizer
from tests.model.test_streaming import saved
from tests.run.test_loop import numbers

STREAM = {"score": {"weights": "stream"}, "distill": {"weights": "stream"}}


def settings(folder: Path, family: str = "llama", **changes: dict[str, Any]) -> dict[str, Any]:
    """A run of a tiny teacher from 6 layers to 4, repaired and trained in each round."""
    teacher = saved(folder / "teacher", family, tied=True)
    text = str(save_texts(folder / "text.jsonl"))
    sections: dict[str, Any] = {
        "teacher": str(teacher),
        "output": str(folder / "run"),
        "stop": {"target_layers": 4},
        "score": {"decide": "teacher_kl", "tokens": 64},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 5}],
        "distill": {
            "text": text,
            "tokens_per_round": 256,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "batch_size": 4,
            "train": "neighbours",
            "learning_rate": 1e-3,
            "repair": {"tokens": 256, "ridge": 0.1},
        },
        "device": "cpu",
    }
    return merged(sections, changes)


def merged(sections: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return sections | {
        name: sections[name] | value if isinstance(value, dict) else value for name, value in changes.items()
    }


def run_of(sections: dict[str, Any], **changes: Any) -> Run:
    return peel(parse_config(merged(sections, changes), "test"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_alike(one: Path, other: Path) -> None:
    """Two checkpoints hold the same."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "config.json").read_text() == (other / "config.json").read_text()


def both_ways(sections: dict[str, Any], tmp_path: Path) -> Run:
    """Runs both ways, compares all that was recorded, and gives the run whose layers were streamed."""
    whole = run_of(sections)
    streamed = run_of(sections, output=str(tmp_path / "streamed"), **STREAM)
    assert numbers(streamed) == numbers(whole) and len(whole.rounds) == 2
    assert streamed.teacher and whole.teacher and streamed.teacher.evaluation == whole.teacher.evaluation
    assert_alike(streamed.student_folder, whole.student_folder)
    for number in (1, 2):
        files = [run.round_folder(number) / "trained.safetensors" for run in (whole, streamed)]
        of_whole, of_streamed = map(load_file, files)
        assert of_whole.keys() == of_streamed.keys()
        assert all(torch.equal(of_whole[name], of_streamed[name]) for name in of_whole)
    return streamed


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi3", "jais2"])  # training streams in every family
def test_of_several_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loading", "streaming"):  # the tokenizers of some families know no word of the texts
        monkeypatch.setattr(f"layerpeel.model.{module}.load_tokenizer", lambda *_, **__: tiny_tokenizer())
    both_ways(settings(tmp_path, family), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": {"decide": "task_quality", "shortlist": {"by": "repaired_kl", "keep": 2}}},
        {"score": {"decide": "block_influence", "every": 0, "heal": {"keep": 2, "steps": 2}}},
        {"distill": {"repair": False, "train": "all", "when": "end"}},
        {"distill": {"when": "half", "last_pass": {"train": "all"}, "train_norm": True}},
        {"distill": {"train_head": True, "train": "above"}},
        {"distill": {"tokens_per_round": 0}},
        {"distill": {"fresh_text": False, "teacher_cache": "on"}},
        {"dtype": "bfloat16", "distill": {"train": r"layers\.5\."}},
    ],
    ids=lambda changes: str([*changes.values()][-1])[:50],
)
def test_however_it_scores_and_heals(changes: dict[str, Any], tmp_path: Path) -> None:
    both_ways(settings(tmp_path, **changes), tmp_path)


def test_no_layer_is_left_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a round is on the disk, nothing of any layer is in memory, of the student or the teacher."""
    record, in_memory = Peeling.record, []

    def watched(self: Peeling, *parts: Any) -> None:
        record(self, *parts)
        for model in (self.student.layerwise, self.student.teacher):
            in_memory.extend(value for value in model.layers.parameters() if not value.is_meta)

    monkeypatch.setattr(Peeling, "record", watched)
    run = run_of(settings(tmp_path, **STREAM))
    assert len(run.rounds) == 2 and not in_memory


@pytest.mark.parametrize("stage", ["repair_student", "evaluate"])
def test_a_resumed_one_is_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    sections = settings(tmp_path, **STREAM)
    whole = run_of(sections)
    run_stage, calls = getattr(peeling, stage), []

    def stops(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 + (stage == "evaluate"):  # in the second round
            raise KeyboardInterrupt
        return run_stage(*args, **options)

    monkeypatch.setattr(peeling, stage, stops)
    with pytest.raises(KeyboardInterrupt):
        run_of(sections, output=str(tmp_path / "stopped"))
    monkeypatch.setattr(sys.modules[peeling.__name__], stage, run_stage)
    resumed = run_of(sections, output=str(tmp_path / "stopped"))
    assert numbers(resumed) == numbers(whole)
    assert_alike(resumed.student_folder, whole.student_folder)


def test_a_round_is_exported_and_what_was_measured_is_what_is_written(tmp_path: Path) -> None:
    run = run_of(settings(tmp_path, **STREAM))
    export_student(run, tmp_path / "first", 1)
    for folder, finished in ((tmp_path / "first", run.rounds[0]), (run.student_folder, run.rounds[1])):
        model, tokenizer = load_model(folder, device="cpu")
        assert evaluate(model, tokenizer, make_tasks(run.config.tasks)) == finished.evaluation


def test_the_last_student_above_the_floor_is_the_result(tmp_path: Path) -> None:
    sections = settings(tmp_path, stop={"min_quality": 1.0, "target_layers": 2}, **STREAM)
    streamed = run_of(sections)
    assert streamed.finish and streamed.finish.reason == "min_quality" and streamed.result_round == 0
    whole = run_of(sections, output=str(tmp_path / "whole"), score={"weights": "memory"}, distill={"weights": "memory"})
    assert numbers(streamed) == numbers(whole)
    assert_alike(streamed.student_folder, whole.student_folder)


def test_the_report_says_why_nothing_was_generated(tmp_path: Path) -> None:
    measured = measurements(run_of(settings(tmp_path, **STREAM)))
    assert isinstance(measured, NotMeasured) and "read its layers from the disk" in measured.problem


def test_studies_and_eval_read_layers_from_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = merged(settings(tmp_path, **STREAM), {"distill": {"tokens_per_round": 0, "repair": False}})
    run = run_of(sections)
    monkeypatch.setattr("layerpeel.inference.loading.load_teacher", None)  # which would load all of it
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    study = tmp_path / "study.yaml"
    study.write_text(f"{{base: run.yaml, output: '{tmp_path / 'out'}', remove: 2}}\n")
    run_study(study)
    assert numbers(Run(tmp_path / "out" / "runs" / "base" / "seed-0")) == numbers(run)
    code, out, err = call(monkeypatch, capsys, "eval", sections["teacher"], str(tmp_path / "run.yaml"), "--json")
    assert run.teacher and (code, json.loads(out)) == (0, evaluation_to_json(run.teacher.evaluation)), err


def refused(sections: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as refusal:
        run_of(sections)
    assert not (Path(sections["output"]) / "journal.jsonl").exists()
    return refusal.value


def test_half_of_it_is_refused(tmp_path: Path) -> None:
    error = refused(settings(tmp_path, distill={"weights": "stream"}))
    assert "distill.weights: stream, and score.weights: memory" in str(error)
    assert error.hint == "set score.weights: stream, too"


def test_text_that_would_be_generated_is_refused(tmp_path: Path) -> None:
    sections = settings(tmp_path, **STREAM)
    sections["distill"]["text"] = [{"from": "teacher", "tokens": 100}]
    assert "for every token that the teacher would write" in str(refused(sections))
    sections = settings(tmp_path / "other", **STREAM)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "target": "b"}\n')
    sections["tasks"].append({"name": "written", "kind": "generate", "data": str(rows)})
    assert "task written generates text" in str(refused(sections))
