"""Compares ways of making a model shallower, by depth, on a config's own tasks.

    python benchmarks/methods.py demo --depths 10,8 --out results.json
    python benchmarks/methods.py configs/storyteller.yaml --depths 14,12 --out results.json

Four ways: the loop as the config says; the loop that chooses by KL to the teacher; the loop without training; and
one-shot block influence without training (ShortGPT, arXiv 2403.03853). Prints a Markdown table, and writes the scores
with the machine and the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import machine
from measuring import write_record
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig
from layerpeel.demo.preparing import prepare_demo
from layerpeel.importance.scoring import score_layers, scoring_text
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.results_json import evaluation_to_json
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation


def main() -> None:
    """Runs the four ways (those that were run before are read from their journals)."""
    options = read_options(__doc__)
    path = prepare_demo(Path("runs/methods-demo")) if options.config == "demo" else options.config
    config = load_config(path, options.set)
    full, by_kl, untrained = peel(config), peel(chosen_by_kl(config)), peel(without_training(config))
    results = {
        "teacher": row(full, full.reference),
        "layerpeel": by_depth(full, options.depths),
        "layerpeel, chosen by KL": by_depth(by_kl, options.depths),
        "loop without training": by_depth(untrained, options.depths),
        "one-shot block influence": one_shot(config, full, options.depths),
    }
    record = {
        "command": f"python benchmarks/methods.py {options.config} --depths {','.join(map(str, options.depths))}",
        "machine": machine(),
        "minutes_of_the_loop": round((full.events[-1].time - full.events[0].time) / 60, 1),
        "results": results,
    }
    write_record(options.out, record, indent=1)
    print(markdown(results))


def read_options(description: str | None) -> argparse.Namespace:
    """A config, overrides, depths and where to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML config, or `demo` for that of the bundled teacher")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, over the config's")
    parser.add_argument("--depths", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def without_training(config: RunConfig) -> RunConfig:
    """The same run with nothing healed and no floor."""
    changed = config.model_copy(deep=True)
    changed.distill.tokens_per_round, changed.distill.repair = 0, False
    changed.stop.min_quality = None
    changed.output = config.output.with_name(config.output.name + "-untrained")
    return changed


def chosen_by_kl(config: RunConfig) -> RunConfig:
    """The same run, where the cheap metric alone chooses the layers."""
    changed = config.model_copy(deep=True)
    changed.score.decide, changed.score.shortlist = "teacher_kl", None
    changed.output = config.output.with_name(config.output.name + "-kl")
    return changed


def by_depth(run: Run, depths: list[int]) -> dict[str, Any]:
    """The rounds of a run that ended in one of the depths."""
    return {str(each.layers): row(run, each.evaluation, each.kept) for each in run.rounds if each.layers in depths}


def one_shot(config: RunConfig, run: Run, depths: list[int]) -> dict[str, Any]:
    """The layers with the least block influence removed at once, without training."""
    results = {}
    for depth in depths:
        model, tokenizer = load_model(config.teacher, device=config.device, dtype=config.dtype)
        total = model.config.num_hidden_layers
        removed = least_influence(config, model, tokenizer)[: total - depth]
        remove_layers(model, removed)
        kept = [layer for layer in range(total) if layer not in removed]
        results[str(depth)] = row(run, evaluate(model, tokenizer, make_tasks(config.tasks)), kept)
    return results


def least_influence(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The layers by block influence, least first."""
    score = config.score.model_copy(update={"decide": "block_influence", "shortlist": None})
    return score_layers(model, tokenizer, score, text=scoring_text(config, tokenizer)).ranked()


def row(run: Run, evaluation: Evaluation, kept: Sequence[int] | None = None) -> dict[str, Any]:
    """Aggregate, share of the teacher's, and each task's score."""
    how = run.config.aggregate
    aggregate = evaluation.aggregate(run.reference, how)
    share = aggregate / run.reference.aggregate(run.reference, how)
    return {"aggregate": aggregate, "kept_quality": share, "kept": kept, "scores": evaluation_to_json(evaluation)}


def markdown(results: dict[str, Any]) -> str:
    """One line a way and depth."""
    names = list(results["teacher"]["scores"])
    lines = ["| layers | method | aggregate | % of teacher | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (4 + len(names)))
    rows = [("all", "teacher", results["teacher"])]
    methods = [name for name in results if name != "teacher"]
    for depth in sorted({depth for name in methods for depth in results[name]}, key=int, reverse=True):
        rows += [(depth, name, results[name][depth]) for name in methods if depth in results[name]]
    for depth, name, result in rows:
        scores = [f"{result['scores'][task]['value']:.3f}" for task in names]
        share = f"{100 * result['kept_quality']:.1f}"
        lines.append(f"| {depth} | {name} | {result['aggregate']:.3f} | {share} | " + " | ".join(scores) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
