"""Scores through lm-evaluation-harness against those of its own model class, for the model and for every removal.

    python benchmarks/harness_equality.py --out results.json
    python benchmarks/harness_equality.py --model ../shared/kit/models/stories260K-hf --limit 20 --out results.json

Zorro (23 tasks and their group) and next_sentence in English and Russian. For each shorter model: which scores differ
as the harness prints them, which by anything at all, how far the log-probabilities of single requests are apart
(floating-point noise of other batches), and by how much the closest call among all samples was decided.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

from machine import machine
from measuring import KIT, write_record
from transformers import PreTrainedModel

from layerpeel.config.run import TaskConfig
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import answer_samples
from layerpeel.tasks.registry import make_tasks

TASKS = KIT / "eval" / "lm_eval"
NAMES = ("zorro", "next_sentence_en", "next_sentence_ru")


def main() -> None:
    """Compares every removal, and writes what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=KIT / "models" / "storyteller-18")
    parser.add_argument("--limit", type=int, default=None, help="samples of each task; all if not given")
    parser.add_argument("--batch-size", type=int, default=64, help="of the harness's own model class")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, tokenizer = load_model(options.model)
    candidates = list(range(model.config.num_hidden_layers))
    started = time.monotonic()
    branches = answer_all(Engine(LayerwiseModel(model), tokenizer, candidates), make_tasks(named(options.limit)))
    record: dict[str, Any] = {
        "command": f"python benchmarks/harness_equality.py --model {options.model.name}"
        + f" --limit {options.limit}" * (options.limit is not None),
        "machine": machine(),
        "seconds_ours": round(time.monotonic() - started, 1),
        "removals": {},
    }
    started = time.monotonic()
    for removed, (scores, answers) in zip([None, *candidates], branches, strict=True):
        shorter = remove_layers(copy.deepcopy(model), [] if removed is None else [removed])
        results = harness(shorter, tokenizer, options.limit, options.batch_size)
        record["removals"][str(removed)] = comparison = compare(scores, answers, results)
        print(f"without {removed}: {comparison}", flush=True)
    record["seconds_harness"] = round(time.monotonic() - started, 1)
    comparisons = record["removals"].values()
    record["models"], record["scores"] = len(comparisons), sum(each["scores"] for each in comparisons)
    record["differ_as_printed"] = sum(len(each["differ_as_printed"]) for each in comparisons)
    record["differ_at_all"] = sum(len(each["differ_at_all"]) for each in comparisons)
    write_record(options.out, record, indent=1)
    print(json.dumps({key: value for key, value in record.items() if key != "removals"}, indent=1))


def named(limit: int | None) -> list[TaskConfig]:
    """The tasks of the group on their own, the group, and the two others."""
    names = [path.stem for path in sorted(TASKS.glob("*.yaml")) if path.stem[0] != "_"]
    tasks = [name if name in NAMES else f"zorro_{name}" for name in names]
    return [
        TaskConfig(kind="harness", name=name, task=name, include_path=str(TASKS), limit=limit)
        for name in [*tasks, "zorro"]
    ]


def answer_all(engine: Engine, tasks: list[Task]) -> list[tuple[dict[str, Any], dict[str, list[list[Any]]]]]:
    """For each branch, the score of each task and the answers to each of its samples."""
    branches: list[tuple[dict[str, Any], dict[str, list[list[Any]]]]] = [({}, {}) for _ in range(engine.branches)]
    for task in tasks:
        samples = task.samples(engine.tokenizer)
        by_branch = answer_samples(engine, samples, task.name)
        for (scores, answers), sample_answers in zip(branches, by_branch, strict=True):
            scores[task.name], answers[task.name] = task.score(samples, sample_answers), sample_answers
    return branches


def harness(model: PreTrainedModel, tokenizer: Any, limit: int | None, batch_size: int) -> dict[str, Any]:
    """The harness's results with its own model class, with each sample."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results: dict[str, Any] = lm_eval.simple_evaluate(
            lm, tasks=list(NAMES), task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=True
        )
    return results


def compare(scores: dict[str, Any], answers: dict[str, list[list[Any]]], results: dict[str, Any]) -> dict[str, Any]:
    """Scores and standard errors that differ, the largest distance of two log-probabilities, and the closest call."""
    printed, at_all, distances, margins = [], [], [0.0], []
    for name, score in scores.items():
        result = results["results"][name]
        for value, other in ((score.value, result["acc,none"]), (score.stderr, result["acc_stderr,none"])):
            if value != other:
                at_all.append((name, value, other))
            if f"{value:.4f}" != f"{other:.4f}":  # four digits, as in its table
                printed.append((name, value, other))
        for likelihoods, sample in zip(answers[name], by_document(results["samples"].get(name, [])), strict=False):
            values = [float(answer.log_probability) for answer in likelihoods]
            distances += [abs(a - float(b[0])) for a, b in zip(values, sample["filtered_resps"], strict=True)]
            margins += [abs(a - b) for a, b in itertools.combinations(values, 2)]
    return {
        "scores": len(scores),
        "differ_as_printed": printed,
        "differ_at_all": at_all,
        "largest_distance": max(distances),
        "closest_call": min(margins, default=None),
        "samples_compared": len(distances) - 1,
    }


def by_document(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


if __name__ == "__main__":
    main()
