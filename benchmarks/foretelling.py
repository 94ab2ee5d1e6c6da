"""Which score of a layer foretells what its loss costs once the student is healed.

    python benchmarks/foretelling.py
    python benchmarks/foretelling.py --real --after 0,3 --at-once 8         # SmolLM2-135M, side by side on a GPU

Every layer that may go is scored by each metric, from a student that lost none or three layers before and was repaired
after each. Then each goes on trial: what is left of the KL to the teacher on held-out text is measured when the layer
is gone, when the student is repaired, and when it was trained on so many tokens besides. Setting, text and held-out
text are those of healing.py, tasks those of the shipped config. What is in the file with the same settings is not
measured again. Prints Markdown tables, and writes what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from healing import REAL, VARIANTS, Setting, config_of, mean_kl, read, real, settings_of, storyteller
from machine import machine
from measuring import ROOT, layers_of, measured_side_by_side, share_gpu, write_record
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from layerpeel.config.distill import DistillConfig
from layerpeel.config.reading import load_config
from layerpeel.config.score import ScoreConfig
from layerpeel.data.batches import load_rows
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.scoring import score_candidates
from layerpeel.model.loading import load_model
from layerpeel.study.rankings import kendall_tau
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.repairing import repair_student
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student

METRICS = ("teacher_kl", "repaired_kl", "block_influence", "task_quality")
STAGES = {"removed": "skipped", "repaired": "repaired", "trained": "repaired and trained"}
READ = 16_384  # tokens that metrics read
TOKENS = 60_000  # of training on trial
REPAIR = 32_768  # of repair, after each removal
FOLDER = Path("runs/foretelling")


def main() -> None:
    """Measures what is not in the file yet."""
    options = read_options()
    setting = real(Path(options.real).expanduser()) if options.real else storyteller()
    if options.worker:
        share_gpu(options.at_once)
        after = setting.removed[: options.after[0]]
        measured = scores(setting, after) if options.worker == "scores" else trial(setting, after, int(options.worker))
        options.out.write_text(json.dumps(measured), encoding="utf-8")
        return
    out = options.out or ROOT / "benchmarks" / "results" / f"foretelling-{setting.teacher.name}.json"
    settings = json.loads(json.dumps(all_settings(setting)))
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = record.get("settings") == settings
    parts: dict[str, Any] = record["measured"] if same else {}
    machines = "; ".join(dict.fromkeys([*(record["machine"].split("; ") if same else ()), machine()]))
    where = ["--real", options.real] if options.real else []
    wanted = [(after, name) for after, name in jobs(setting, options.after) if name not in parts.get(str(after), {})]
    given = [["--worker", name, "--after", after, *where] for after, name in wanted]
    for number, measured in measured_side_by_side(__file__, given, options.at_once):
        after, name = wanted[number]
        parts.setdefault(str(after), {})[name] = measured
        command = "python benchmarks/foretelling.py" + " --real" * bool(options.real) + f" --after {','.join(parts)}"
        write_record(out, {"command": command, "machine": machines, "settings": settings, "measured": parts})
        print(f"after {after} removals: {name}", flush=True)
    print(markdown(parts))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs="?", const=REAL, help=f"a published model; {REAL} if no folder follows")
    parser.add_argument("--after", type=lambda text: [int(part) for part in text.split(",")], default=[0, 3])
    parser.add_argument("--at-once", type=int, default=1, help="trials that run side by side")
    parser.add_argument("--out", type=Path, help="benchmarks/results/foretelling-TEACHER.json, if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def distil_config(setting: Setting) -> DistillConfig:
    """The package's defaults, but for the tokens."""
    config = config_of(setting, VARIANTS["default"], TOKENS)
    return DistillConfig.model_validate(config.model_dump(exclude_unset=True) | {"repair": {"tokens": REPAIR}})


def all_settings(setting: Setting) -> dict[str, Any]:
    """All that a measurement depends on, but for the code."""
    fixed = settings_of(setting, VARIANTS["default"], TOKENS)
    return {**fixed, "repair": REPAIR, "read": READ, "metrics": METRICS}


def jobs(setting: Setting, depths: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The scores, and each layer's trial; the first and the last layer stay."""
    layers = layers_of(setting.teacher)
    for after in depths:
        yield after, "scores"
        yield from ((after, str(layer)) for layer in range(1, layers - 1) if layer not in setting.removed[:after])


def begin(setting: Setting, after: Sequence[int]) -> tuple[Student, PreTrainedTokenizerBase]:
    """A student that lost these layers one by one and was repaired after each; its weights are kept on the disk."""
    teacher, tokenizer = load_model(setting.teacher, dtype=setting.dtype)
    student = Student(teacher)
    path = FOLDER / setting.teacher.name / f"without-{'-'.join(map(str, after))}.safetensors"
    if after and path.exists():
        student.remove(after)
        student.load_trained(load_file(path))
        return student, tokenizer
    for layer in after:
        student.remove([layer])
        repair_student(student, tokenizer, distil_config(setting), [layer], storage=teacher.dtype)
    if after:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # trials side by side may all begin here
        save_file(student.trained_state(), partial)
        partial.replace(path)
    return student, tokenizer


def scores(setting: Setting, after: Sequence[int]) -> dict[str, dict[str, float]]:
    """What each metric says of each layer."""
    student, tokenizer = begin(setting, after)
    shipped = "storyteller" if setting.teacher == storyteller().teacher else "smollm2-135m"
    tasks = make_tasks(load_config(ROOT / "configs" / f"{shipped}.yaml").tasks)
    config = distil_config(setting)
    text = load_rows(config.text, tokenizer, sequence_length=config.sequence_length, max_tokens=READ)
    candidates = [student.kept_layers.position(layer) for layer in student.kept_layers.removable()]
    measured = {}
    for metric in METRICS:
        needs = make_metric(metric).needs
        inputs = ScoringInputs(
            student.layerwise,
            student.teacher,
            tokenizer,
            candidates,
            text,
            tasks if "tasks" in needs else (),
            evaluate(student.teacher, tokenizer, tasks) if "tasks" in needs else None,
            config=ScoreConfig(decide=metric, shortlist=None),
        )
        result = score_candidates(inputs, student.kept_layers)
        measured[metric] = {str(layer): value for layer, value in result.importance.items()}
    return measured


def trial(setting: Setting, after: Sequence[int], layer: int) -> dict[str, float]:
    """The KL to the teacher, mean over the kinds of held-out text, after each stage of healing."""
    student, tokenizer = begin(setting, after)
    config, storage = distil_config(setting), student.teacher.model.dtype
    texts = [read(path, tokenizer, setting.texts) for path in setting.held_out.values()]

    def left() -> float:
        return mean(mean_kl(student.model, student.teacher.model, each) for each in texts)

    student.remove([layer])
    measured = {"removed": left()}
    repair_student(student, tokenizer, config, [layer], storage=storage)
    measured["repaired"] = left()
    train_student(student, tokenizer, config.in_rounds(), storage=storage)
    return measured | {"trained": left()}


def markdown(parts: Mapping[str, Any]) -> str:
    """A table of metrics and one of layers for each number of removals before, of the layers that were on trial."""
    return "\n\n".join(
        f"After {after} removals{so_far(measured)}:\n\n{of_metrics(measured)}\n\n{of_layers(measured)}"
        for after, measured in sorted(parts.items())
        if "scores" in measured and len(on_trial(measured)) > 1
    )


def on_trial(measured: Mapping[str, Any]) -> list[str]:
    """The layers whose loss was measured."""
    return [layer for layer in measured["scores"]["teacher_kl"] if layer in measured]


def so_far(measured: Mapping[str, Any]) -> str:
    """How many that is, if not all."""
    some, every = len(on_trial(measured)), len(measured["scores"]["teacher_kl"])
    return "" if some == every else f" ({some} of {every} layers so far)"


def of_metrics(measured: Mapping[str, Any]) -> str:
    """How well each metric ranks layers, and what its choice costs against the best one's."""
    lines = [
        f"| score | {' | '.join(f'tau, {stage}' for stage in STAGES.values())} | its choice | costs in the end |"
        " the best costs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    layers = on_trial(measured)
    for metric, importance in measured["scores"].items():
        taus = [
            kendall_tau([importance[each] for each in layers], [measured[each][stage] for each in layers])
            for stage in STAGES
        ]
        choice = min(layers, key=lambda each: importance[each])
        best = min(layers, key=lambda each: measured[each]["trained"])
        cells = [f"`{metric}`", *("" if tau is None else f"{tau:.2f}" for tau in taus), choice]
        cells += [f"{measured[choice]['trained']:.4f}", f"{measured[best]['trained']:.4f} (layer {best})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def of_layers(measured: Mapping[str, Any]) -> str:
    """What each layer's loss costs, and what the metrics say."""
    metrics = [*measured["scores"]]
    heads = [f"KL, {stage}" for stage in STAGES.values()] + [f"`{metric}`" for metric in metrics]
    lines = [f"| layer | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for layer in on_trial(measured):
        cells = [f"{measured[layer][stage]:.4f}" for stage in STAGES]
        cells += [f"{measured['scores'][metric][layer]:.4f}" for metric in metrics]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
