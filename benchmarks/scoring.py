"""Times scoring every layer of a model on tasks of lm-evaluation-harness.

    python benchmarks/scoring.py --out results.json                    # the kit's storyteller-18, Zorro, next_sentence
    python benchmarks/scoring.py --model FOLDER --limit 100 --out …    # any model; PIQA, ARC-easy and HellaSwag

Three rivals of the one pass, all on the same samples:
(a) a loop that removes each candidate and runs the model on padded batches (`loop`); and the same loop over the very
    rows that the one pass runs, with shared beginnings (`loop_same_rows`);
(b) the harness's own model class, HFLM, on each candidate (`harness`); and against it, the one pass with a race among
    eight candidates, which a score on text names (`SHORTLISTS`).
Says how far their scores differ at the most (`--only scores --dtype float32`: in another dtype, without the times), and
whether shortlist and race choose the layer that the full scores choose, from all layers down to --depth. (b) is timed
on some candidates, and taken for all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from measuring import KIT, timed, write_record
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import TaskConfig
from layerpeel.config.score import ProtectConfig, RaceConfig, ScoreConfig, ShortlistConfig
from layerpeel.data.batches import load_rows
from layerpeel.importance.scores import LayerScores
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Likelihood, LogLikelihood
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import score_tasks
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation, TaskScore

PARTS = ("times", "scores", "choices")
SHORTLISTS = ("teacher_kl", "repaired_kl")
TOKENS_PER_BATCH = 4096  # of the padded loop; more is slower on two cores
STORIES = ("zorro", "next_sentence_en", "next_sentence_ru")
BENCHMARKS = {"piqa": "piqa", "arc_easy": "arc_easy_val", "hellaswag": "hellaswag"}  # and their files in the kit
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}}}}}
validation_split: train
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "{{{{context}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


@dataclass(frozen=True)
class Bench:
    """What is scored.

    Attributes:
        teacher: the model's folder.
        dtype: of its weights.
        names: of the harness's tasks.
        folder: where their files are.
        text: what the shortlist's metric reads.
        limit: samples of each task.
    """

    teacher: Path
    dtype: str
    names: Sequence[str]
    folder: Path
    text: Sequence[Path]
    limit: int | None

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path) -> Bench:
        """The storyteller's, or another model's, with its tasks' files written into a folder."""
        if not options.model:
            text = [KIT / "text" / name for name in ("tinystories_2M.txt", "stories_ru.jsonl")]
            dtype = options.dtype or "float32"
            return cls(KIT / "models/storyteller-18", dtype, STORIES, KIT / "eval/lm_eval", text, options.limit)
        for name, data in BENCHMARKS.items():
            data = str((KIT / "real/eval" / f"{data}.jsonl").resolve())
            (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data), encoding="utf-8")
        text = [KIT / "real/text/general_en.jsonl"]
        dtype = options.dtype or "bfloat16"
        return cls(options.model.expanduser(), dtype, [*BENCHMARKS], folder, text, options.limit)

    @cached_property
    def tasks(self) -> list[Task]:
        return make_tasks(
            [
                TaskConfig(kind="harness", name=name, task=name, include_path=str(self.folder), limit=self.limit)
                for name in self.names
            ]
        )


def main() -> None:
    """Runs all rivals and writes the ratios of their times over that of the one pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder; the kit's storyteller-18, if not given")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, of which the median counts")
    parser.add_argument("--candidates", type=int, default=3, help="candidates that the rivals are timed on")
    parser.add_argument("--limit", type=int, default=None, help="samples of each task, for a quick look")
    parser.add_argument("--depth", type=int, default=8, help="where the comparison of choices ends")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 with --model, if not given")
    parser.add_argument("--only", choices=PARTS, help="one part; the others stay as --out has them")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        compare(Bench.of(options, Path(folder)), options)


def compare(bench: Bench, options: argparse.Namespace) -> None:
    """Times, scores, and choices; writes them."""
    model, tokenizer = load_model(bench.teacher, dtype=bench.dtype)
    tasks = bench.tasks
    races = {by: ScoreConfig(race=RaceConfig(), shortlist=ShortlistConfig(by=by, keep=8)) for by in SHORTLISTS}
    sources = [TextConfig(path=str(path)) for path in bench.text]
    text = load_rows(sources, tokenizer, sequence_length=256, max_tokens=4096)

    def one_pass(config: ScoreConfig | None = None, shorter: PreTrainedModel = model) -> LayerScores:
        return score_layers(shorter, tokenizer, config or ScoreConfig(), tasks=tasks, text=text)

    record = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    record["command"] = command(options)
    differences = record.setdefault("differences", {})  # by dtype
    if options.only in (None, "times"):
        record["machine"] = machine()
        measured, differences[bench.dtype] = compare_times(options, bench, model, tokenizer, one_pass, races)
        record |= measured
    if options.only == "scores":
        differences[bench.dtype] = compare_scores(options, bench, model, tokenizer, one_pass)
    if options.only in (None, "choices"):
        record["rounds"] = []
        for finished in compare_choices(model, one_pass, races, options.depth):
            record["rounds"].append(finished)
            write_record(options.out, record, indent=1)
            print(finished, flush=True)
    write_record(options.out, record, indent=1)
    print(json.dumps({k: record[k] for k in ("ratios", "differences") if k in record}, indent=1))


def command(options: argparse.Namespace) -> str:
    """What was called, without the places of files."""
    parts = ["python benchmarks/scoring.py", *([f"--model {options.model.name}"] if options.model else [])]
    return " ".join([*parts, *([f"--limit {options.limit}"] if options.limit is not None else [])])


def compare_times(
    options: argparse.Namespace,
    bench: Bench,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    one_pass: Callable[..., LayerScores],
    races: Mapping[str, ScoreConfig],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Medians of all rivals' times over that of the one pass; and how far scores differ."""
    tasks, chosen = bench.tasks, some(model, options)
    models = model.config.num_hidden_layers - 1  # the model itself, and each candidate
    times: dict[str, list[float]] = {name: [] for name in ("ours", *races, "loop", "loop_same_rows")}
    cheap: dict[str, list[float]] = {by: [] for by in races}
    for _ in range(options.repeats):
        result = timed(times["ours"], one_pass)
        for by, config in races.items():
            by_race = timed(times[by], partial(one_pass, config))
            cheap[by].append(by_race.cheap.seconds)
        by_loop = timed(times["loop"], lambda: loop(model, tokenizer, tasks, chosen, padded))
        same_rows = timed(times["loop_same_rows"], lambda: loop(model, tokenizer, tasks, chosen, one_by_one))
        print({name: round(values[-1], 1) for name, values in times.items()}, flush=True)
    per_candidate = []
    by_harness = {}
    for candidate in chosen:
        started = time.monotonic()
        by_harness[candidate] = harness(shortened(model, candidate), tokenizer, bench)
        per_candidate.append(time.monotonic() - started)
        print(candidate, round(per_candidate[-1], 1), flush=True)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name in ("loop", "loop_same_rows"):
        middle[name] *= models / len(chosen)
    of_harness = statistics.median(per_candidate) * models
    measured = {
        "seconds": middle | {"harness": of_harness, "harness_per_candidate": per_candidate},
        "all_seconds": times,
        "shortlist_seconds": {by: statistics.median(seconds) for by, seconds in cheap.items()},
        "ratios": {
            "loop": middle["loop"] / middle["ours"],
            "loop_same_rows": middle["loop_same_rows"] / middle["ours"],
            "harness": of_harness / middle["ours"],
            "raced_harness": {by: of_harness / middle[by] for by in races},
        },
    }
    return measured, furthest(result, {"loop": by_loop, "loop_same_rows": same_rows, "harness": by_harness})


def some(model: PreTrainedModel, options: argparse.Namespace) -> list[int | None]:
    """The model itself, and as many candidates as the rivals run, over all of its depth."""
    candidates = range(1, model.config.num_hidden_layers - 1)
    return [None, *candidates[:: max(1, len(candidates) // options.candidates)][: options.candidates]]


def compare_scores(
    options: argparse.Namespace,
    bench: Bench,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    one_pass: Callable[..., LayerScores],
) -> dict[str, float]:
    """How far all rivals' scores are from those of one pass over the same candidates."""
    chosen = some(model, options)
    others = [layer for layer in range(model.config.num_hidden_layers) if layer not in chosen]
    by_loop, same_rows = (loop(model, tokenizer, bench.tasks, chosen, answer) for answer in (padded, one_by_one))
    by_harness = {candidate: harness(shortened(model, candidate), tokenizer, bench) for candidate in chosen}
    result = one_pass(ScoreConfig(protect=ProtectConfig(layers=others)))
    return furthest(result, {"loop": by_loop, "loop_same_rows": same_rows, "harness": by_harness})


Scores = dict[int | None, dict[str, float]]  # by candidate and task


def furthest(result: LayerScores, rivals: Mapping[str, Scores]) -> dict[str, float]:
    """The largest difference of a rival's accuracy from the one pass's; for the model itself, from the harness's."""
    ours: Scores = {
        candidate: {name: score.value for name, score in evaluation.scores.items()}
        for candidate, evaluation in result.evaluations.items()
    } | {None: rivals["harness"][None]}
    return {
        rival: max(
            abs(value - ours[candidate][name]) for candidate, each in scores.items() for name, value in each.items()
        )
        for rival, scores in rivals.items()
    }


def shortened(model: PreTrainedModel, candidate: int | None) -> PreTrainedModel:
    """A copy of the model without one layer."""
    return remove_layers(copy.deepcopy(model), [] if candidate is None else [candidate])


def loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    candidates: list[int | None],
    answer: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Task]], dict[str, TaskScore]],
) -> dict[int | None, dict[str, float]]:
    """Each task's score for the model and for each candidate, removed and run."""
    return {
        candidate: {name: s.value for name, s in answer(shortened(model, candidate), tokenizer, tasks).items()}
        for candidate in candidates
    }


def one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task]) -> dict[str, TaskScore]:
    """The rows that the one pass runs, for one model by itself."""
    return score_tasks(Engine(LayerwiseModel(model), tokenizer), tasks)[0]


@torch.no_grad()
def padded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task]) -> dict[str, TaskScore]:
    """Padded batches of sequences of like length through the model's own forward, as one would write it by hand."""
    scores = {}
    for task in tasks:
        samples = task.samples(tokenizer)
        requests = [request for sample in samples for request in sample.requests if isinstance(request, LogLikelihood)]
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context + requests[i].continuation))
        answers: list[Likelihood] = [Likelihood(0.0, False)] * len(requests)
        while order:
            width = len(requests[order[0]].context + requests[order[0]].continuation)
            batch, order = order[: TOKENS_PER_BATCH // width], order[TOKENS_PER_BATCH // width :]
            rows = [requests[i].context + requests[i].continuation for i in batch]
            ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            logs = model(ids[:, :-1], attention_mask=mask[:, :-1]).logits.float().log_softmax(-1)
            for index, row, log_probs in zip(batch, rows, logs, strict=True):
                start = len(requests[index].context)
                target = torch.tensor(row[start:])
                predicted = log_probs[start - 1 : len(row) - 1]
                total = predicted.gather(-1, target[:, None]).sum().item()
                answers[index] = Likelihood(total, bool((predicted.argmax(-1) == target).all()))
        rest = iter(answers)
        scores[task.name] = task.score(samples, [[next(rest) for _ in sample.requests] for sample in samples])
    return scores


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bench: Bench) -> dict[str, float]:
    """Each task's score by the harness with its own model class."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        manager = TaskManager(include_path=str(bench.folder), include_defaults=False)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64)
        results = lm_eval.simple_evaluate(
            lm, tasks=[*bench.names], task_manager=manager, limit=bench.limit, bootstrap_iters=0, log_samples=False
        )
    return {name: results["results"][name]["acc,none"] for name in bench.names}


def compare_choices(
    model: PreTrainedModel, one_pass: Callable[..., LayerScores], races: Mapping[str, ScoreConfig], depth: int
) -> Iterator[dict[str, Any]]:
    """From the model's depth down, without training: the choice by full scores, and by each shortlist and race."""
    shorter = copy.deepcopy(model)
    while shorter.config.num_hidden_layers > depth:
        full = one_pass(None, shorter)
        choices = {by: choice(full, one_pass(config, shorter).ranked()[0]) for by, config in races.items()}
        best = full.ranked()[0]
        yield {"layers": shorter.config.num_hidden_layers, "full": best, "raced": choices}
        remove_layers(shorter, [best])


def choice(full: LayerScores, other: int) -> dict[str, Any]:
    """How a layer compares with the one that the full scores choose."""
    best = full.ranked()[0]
    gap = full.importance[other] - full.importance[best]
    evaluations = full.evaluations
    error = Evaluation.difference_stderr(evaluations[best], evaluations[other], evaluations[best])
    return {"layer": other, "same": best == other, "gap": gap, "stderr": error, "within_one_stderr": gap <= error}


if __name__ == "__main__":
    main()
