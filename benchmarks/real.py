"""Makes SmolLM2-135M shallower in many ways, at equal tokens, and judges all of them on the same benchmarks and text.

    python benchmarks/real.py --ways default,paper,loop-untrained --tokens 300_000
    python benchmarks/real.py --teacher FOLDER            # all ways; another model needs a config of its own
    python benchmarks/real.py --ways default,paper --seeds 0,1,2 --at-once 6        # side by side, on a GPU

Ours: the loop of configs/smollm2-135m.yaml, with its fields changed; or the layers with the least block influence
(ShortGPT, arXiv 2403.03853) removed at once. Peers (see real_peers.py): OptiPFair's depth pruning and distillation,
the distillation trainers of NVIDIA Model-Optimizer and TRL on the block-influence prune. Each runs in a process of its
own, for its peak of memory; students are kept in runs/real; what is in the file with the same settings is not run
again. Seeds change the text that ways of our own are trained on; of ways that run side by side, no minutes are kept. A
student is judged on rows of benchmarks that the config does not choose layers by, and by its KL to the teacher
on held-out text. Prints a Markdown table, and writes what was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_peers
import torch
from distillation import peak_gib
from healing import REAL, heal, mean_kl, mean_of, names_among, read, without_places
from machine import machine
from matplotlib.figure import Figure
from measuring import KIT, ROOT, layers_of, measured_side_by_side, share_gpu, write_record
from methods import least_influence
from transformers import PreTrainedModel

from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig, TaskConfig
from layerpeel.export.student import export_student
from layerpeel.model.devices import pick_device
from layerpeel.model.loading import load_model
from layerpeel.model.saving import save_model
from layerpeel.model.surgery import remove_layers
from layerpeel.report.gather import costs_of
from layerpeel.report.style import COLOURS, INK, canvas
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation, TaskScore

CONFIG = ROOT / "configs" / "smollm2-135m.yaml"
EVAL = KIT / "real" / "eval"
FOLDER = Path("runs/real")
TOKENS = 300_000  # of training in all, where the ways are compared; other amounts are further rows
FIRST = 100  # rows of each benchmark that configs may choose layers by, and that are not judged on
TASKS: dict[str, dict[str, Any]] = {
    "piqa": {"kind": "choice", "rows": 400},
    "arc_easy_val": {"kind": "choice", "rows": 400},
    "hellaswag": {"kind": "choice", "rows": 300},
    "sciq": {"kind": "choice", "rows": 400},
    "squad": {"kind": "generate", "rows": 150, "metric": "rouge1", "max_new_tokens": 24},
}
TEXTS = {"web": "ppl_web_c4.jsonl", "wiki": "ppl_wiki_en.jsonl", "stackexchange": "ppl_stackexchange.jsonl"}


@dataclass(frozen=True)
class Way:
    """A way to make the teacher shallower.

    Attributes:
        kind: `loop`: as the config says. `one_shot`: the least block influence, at once. Else a peer of `real_peers`.
        title: what readers call it.
        distill: fields of `distill` that the config does not have so.
        score: fields of `score`, likewise.
    """

    kind: str
    title: str
    distill: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.distill.get("tokens_per_round") != 0


UNTRAINED = {"tokens_per_round": 0, "repair": False}
BY_REPAIRED_KL = {"decide": "repaired_kl"}
BY_TASKS = {"shortlist": {"by": "teacher_kl", "keep": 4}, "decide": "task_quality"}
WAYS: dict[str, Way] = {
    "default": Way("loop", "layerpeel"),
    "trained-each-round": Way("loop", "layerpeel, trained after each removal", {"when": "each_round"}),
    "trained-half-and-half": Way("loop", "layerpeel, half of the training after each removal", {"when": "half"}),
    "paper": Way("loop", "layerpeel, preset: paper, 8 rows a step", {"preset": "paper", "tokens_per_step": 2_048}),
    "repair-alone": Way("loop", "layerpeel, repaired, not trained", {"tokens_per_round": 0}),
    "repair-alone-chosen-by-repaired-kl": Way(
        "loop",
        "layerpeel, chosen by repaired_kl, repaired, not trained",
        {"tokens_per_round": 0},
        BY_REPAIRED_KL,
    ),
    "loop-untrained": Way("loop", "layerpeel, neither repaired nor trained", UNTRAINED),
    "chosen-by-repaired-kl": Way("loop", "layerpeel, layers chosen by repaired_kl", score=BY_REPAIRED_KL),
    "well-repaired": Way(
        "loop",
        "layerpeel, layers chosen by repaired_kl, repaired on 131,072 tokens",
        {"repair": {"tokens": 131_072}, "learning_rate": 2e-4},
        BY_REPAIRED_KL,
    ),
    "chosen-by-tasks": Way("loop", "layerpeel, layers chosen by tasks", score=BY_TASKS),
    "block-influence": Way("one_shot", "one-shot block influence (ShortGPT)", UNTRAINED),
    "block-influence-trained": Way("one_shot", "layers of the least block influence, healed by layerpeel"),
    "optipfair": Way("optipfair", "OptiPFair, its layers, its distillation"),
    "modelopt": Way("modelopt", "layers of the least block influence, distilled by NVIDIA Model-Optimizer"),
    "trl-gkd": Way("trl_gkd", "layers of the least block influence, distilled by TRL (GKD)"),
}


def main() -> None:
    """Measures what is not in the file yet, one way after another."""
    options = read_options()
    if options.worker:
        share_gpu(options.at_once)
        options.out.write_text(json.dumps(measure(options.worker, options)), encoding="utf-8")
        return
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else []
    wanted = list(missing(rows, options))
    given = ["--teacher", options.teacher, "--config", options.config, "--tokens", options.tokens]
    given += ["--depths", ",".join(map(str, options.depths))]
    jobs = [["--worker", key["way"], "--seeds", key["seed"], *given] for key, _ in wanted]
    for number, measured in measured_side_by_side(__file__, jobs, options.at_once):
        key, settings = wanted[number]
        alone = {} if options.at_once == 1 else {"minutes": None}
        rows = [row for row in rows if key_of(row) != key]
        rows += [{**key, **each, **alone, "machine": machine(), "settings": settings} for each in measured]
        write(options.out, rows)
    print(markdown(rows))


def missing(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Iterable[tuple[dict[str, Any], Any]]:
    """The keys and settings of what is asked for and not there; peers have one seed, and so has the teacher."""
    for seed in options.seeds:
        for name in ["teacher", *options.ways]:
            ours = name in WAYS and WAYS[name].kind in ("loop", "one_shot")
            if seed != options.seeds[0] and not ours:
                continue
            key = {"way": name, "tokens": tokens_in_all(name, options), "seed": seed if ours else 0}
            settings = json.loads(json.dumps(settings_of(name, seed, options)))
            if not any(key_of(row) == key and row["settings"] == settings for row in rows):
                yield key, settings


def key_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What tells rows of different runs apart."""
    return {"way": row["way"], "tokens": row["tokens"], "seed": row.get("seed", 0)}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=REAL, help=f"{REAL}, if not given")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--ways", type=names_among("way", WAYS), default=[*WAYS], help=", ".join(WAYS))
    parser.add_argument("--depths", type=lambda text: [int(part) for part in text.split(",")], default=[27, 24])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of training in all")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--at-once", type=int, default=1, help="ways that run side by side")
    parser.add_argument("--out", type=Path, help="benchmarks/results/real-TEACHER.json, if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.teacher = Path(options.teacher).expanduser()
    options.folder = FOLDER / str(options.tokens) / f"seed-{options.seeds[0]}"  # of a worker, which has one
    options.out = options.out or ROOT / "benchmarks" / "results" / f"real-{options.teacher.name}.json"
    return options


def tokens_in_all(name: str, options: argparse.Namespace) -> int:
    """Of training; a way that does not train has one row, whatever --tokens says."""
    return options.tokens if name in WAYS and WAYS[name].trains else 0


def config_of(way: Way, seed: int, options: argparse.Namespace) -> RunConfig:
    """The config with the teacher, the tokens, the seed and the way's fields."""
    config = load_config(options.config, [f"teacher={options.teacher}", f"seed={seed}"])
    removed = layers_of(options.teacher) - min(options.depths)
    fields = config.model_dump(mode="json", exclude_unset=True)
    fields["stop"] = {"target_layers": min(options.depths)}
    fields["distill"] |= {"tokens_per_round": options.tokens // removed, **way.distill}
    if "preset" in way.distill:
        fields["distill"] = {key: value for key, value in fields["distill"].items() if key not in ("repair", "when")}
    fields["score"] |= way.score
    return RunConfig.model_validate(fields)


def settings_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All that a row depends on, but for the code, without the places of files."""
    judged = {"teacher": options.teacher.name, "tasks": TASKS, "first": FIRST, "texts": TEXTS}
    if name == "teacher":
        return judged
    way = WAYS[name]
    if way.kind not in ("loop", "one_shot"):
        return {**judged, "tokens": options.tokens, "peer": real_peers.versions(), "depths": options.depths}
    config = config_of(way, seed, options).model_dump(mode="json")
    parts = {part: config[part] for part in ("score", "distill", "dtype", "seed")}
    return {**judged, "depths": options.depths, **without_places(parts)}


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each depth: what was kept, tokens, minutes and memory of the way, and how its student does."""
    started = time.monotonic()
    if name == "teacher":
        made: Iterable[tuple[Path, dict[str, Any]]] = [(options.teacher, {"layers": layers_of(options.teacher)})]
    else:
        way = WAYS[name]
        make = {"loop": by_loop, "one_shot": by_one_shot}.get(way.kind, by_peer)
        made = list(make(name, way, options))
    spent = {"minutes": (time.monotonic() - started) / 60, "peak_gib": peak_gib(pick_device())}
    return [spent | row | judge(student, options) for student, row in made]


def by_loop(name: str, way: Way, options: argparse.Namespace) -> Iterable[tuple[Path, dict[str, Any]]]:
    """The rounds of a run that ended in one of the depths; of a run that trains at its end, only the last."""
    config = config_of(way, options.seeds[0], options)
    config.output = options.folder / name
    run = peel(config)
    for number, each in enumerate(run.rounds, start=1):
        if each.layers in options.depths and (number == len(run.rounds) or not config.distill.at_end(1)):
            student = options.folder / f"{name}-{each.layers}"
            if not student.exists():
                export_student(run, student, None if number == len(run.rounds) else number)
            costs = costs_of(run)  # of all parts of a run that was interrupted
            seconds = costs.scoring_seconds + costs.repair_seconds + costs.training_seconds
            row = {"layers": each.layers, "kept": each.kept, "minutes": seconds / 60}
            yield student, row | tokens_of(run, number)


def tokens_of(run: Run, rounds: int) -> dict[str, int]:
    """What the first rounds of a run were trained and repaired on; and all of it, at the end."""
    chosen = run.rounds[:rounds]
    last = [run.last_pass.training] if run.last_pass and rounds == len(run.rounds) else []
    return {
        "trained_on": sum(training.tokens for training in [*(each.training for each in chosen), *last]),
        "repaired_on": sum(each.repair.tokens for each in chosen if each.repair),
    }


def by_one_shot(name: str, way: Way, options: argparse.Namespace) -> Iterable[tuple[Path, dict[str, Any]]]:
    """The layers with the least block influence, removed at once, and healed on as many tokens as a run has."""
    config = config_of(way, options.seeds[0], options)
    for depth in [min(options.depths)] if way.trains else options.depths:
        teacher, tokenizer = load_model(options.teacher, dtype=config.dtype)
        removed = least_influence(config, teacher, tokenizer)[: layers_of(options.teacher) - depth]
        distill = config.distill.model_copy(update={"tokens_per_round": options.tokens if way.trains else 0})
        student, repairs, trainings = heal(teacher, tokenizer, [removed], distill, config.seed)
        folder = options.folder / f"{name}-{depth}"
        save_model(student, tokenizer, folder, teacher.dtype)
        spent = {
            "trained_on": sum(training.tokens for training in trainings),
            "repaired_on": sum(repair.tokens for repair in repairs),
        }
        yield folder, {"layers": depth, "kept": kept_of(options, removed), **spent}


def kept_of(options: argparse.Namespace, removed: Sequence[int]) -> list[int]:
    """The teacher's layers but those."""
    return [layer for layer in range(layers_of(options.teacher)) if layer not in removed]


def by_peer(name: str, way: Way, options: argparse.Namespace) -> Iterable[tuple[Path, dict[str, Any]]]:
    """A peer's own training, at the lowest depth, saved as its users save it."""
    depth = min(options.depths)
    folder = options.folder / f"{name}-{depth}"
    text = KIT / "real" / "text" / "general_en.jsonl"
    job = real_peers.Job(options.teacher, layers_of(options.teacher) - depth, text, options.tokens, folder)
    if way.kind == "optipfair":
        kept, trained = real_peers.optipfair(job)
    else:
        config = config_of(way, options.seeds[0], options)
        removed = least_influence(config, *load_model(options.teacher, dtype=config.dtype))[: job.removals]
        student = remove_layers(real_peers.load(options.teacher, torch.float32), removed)
        kept = kept_of(options, removed)
        trained = {"modelopt": real_peers.modelopt, "trl_gkd": real_peers.trl_gkd}[way.kind](job, student)
    yield folder, {"layers": depth, "kept": kept, "trained_on": trained, "repaired_on": 0}


def judge(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How a checkpoint does: accuracy by benchmark with each row's answer, and KL to the teacher by kind of text."""
    student, tokenizer = load_model(folder, dtype="bfloat16")
    teacher: PreTrainedModel = load_model(options.teacher, dtype="bfloat16")[0]
    scores = evaluate(student, tokenizer, make_tasks(judged_tasks())).scores
    texts = {kind: read(EVAL / name, tokenizer, 20) for kind, name in TEXTS.items()}
    return {
        "scores": {name: score_to_json(score) for name, score in scores.items()},
        "kl": {kind: mean_kl(student, teacher, each) for kind, each in texts.items()},
    }


def judged_tasks() -> list[TaskConfig]:
    """The tasks, on rows after the `FIRST`, which are written out for them."""
    tasks = []
    for name, fields in TASKS.items():
        options = {key: value for key, value in fields.items() if key != "rows"}
        lines = (EVAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        data = FOLDER / "eval" / f"{name}.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("\n".join(lines[FIRST : FIRST + fields["rows"]]) + "\n", encoding="utf-8")
        tasks.append(TaskConfig.model_validate({"name": name, "data": str(data.resolve()), **options}))
    return tasks


def score_to_json(score: TaskScore) -> dict[str, Any]:
    """With each row's own score, from 0 to 99, for differences that are paired."""
    rows = [round(100 * (score.value + each)) for each in score.influences or ()]
    return {"value": score.value, "stderr": score.stderr, "chance": score.chance or 0.0, "rows": rows}


def write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows, whole or not at all, in the order of `WAYS`."""
    order = ["teacher", *WAYS]
    ordered = sorted(rows, key=lambda row: (order.index(row["way"]), row["tokens"], row.get("seed", 0), -row["layers"]))
    command = "python benchmarks/real.py"
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    write_record(out, {"command": command, "machine": machines, "rows": ordered})


def teacher_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(row for row in rows if row["way"] == "teacher")


def above_chance(row: Mapping[str, Any]) -> float:
    """Mean score of the benchmarks, less the mean of guessing."""
    return sum(score["value"] - score["chance"] for score in row["scores"].values()) / len(row["scores"])


def difference_stderr(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Standard error of the difference of two rows' means, paired row by row."""
    left, right = (
        Evaluation({name: TaskScore.of_mean([each / 100 for each in score["rows"]]) for name, score in scores.items()})
        for scores in (one["scores"], other["scores"])
    )
    return left.difference_stderr(right, right)


def kept(row: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[float, float]:
    """Share of the teacher's mean above chance, with the standard error of the difference, in %."""
    share = 100 / above_chance(teacher)
    return above_chance(row) * share, 0.0 if row is teacher else difference_stderr(row, teacher) * share


def kl_of(row: Mapping[str, Any]) -> float:
    """Mean KL to the teacher over the kinds of text."""
    return sum(row["kl"].values()) / len(row["kl"])


def title_of(row: Mapping[str, Any]) -> str:
    """What a way is called, with its tokens where they are not those of the others, and its seed but for the first."""
    title = WAYS[row["way"]].title if row["way"] in WAYS else row["way"]
    seed = row.get("seed", 0)
    return title + f", {row['tokens']:,} tokens" * (row["tokens"] not in (0, TOKENS)) + f", seed {seed}" * (seed > 0)


def minutes_of(row: Mapping[str, Any]) -> str:
    """As a table shows them: nothing, for ways that ran side by side."""
    return "" if row["minutes"] is None else f"{row['minutes']:.0f}"


def at_lowest_depth(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The ways that are compared, at the lowest depth, best first."""
    depth = min(row["layers"] for row in rows)
    compared = [row for row in rows if row["tokens"] in (0, TOKENS) and row.get("seed", 0) == 0]
    return by_depth([row for row in compared if row["layers"] == depth])


def by_depth(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows, most layers first; of those with as many, the best first, by their KL."""
    return sorted(rows, key=lambda row: (-row["layers"], kl_of(row)))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row, with each benchmark and each kind of text."""
    teacher = teacher_of(rows)
    tasks, kinds = [*teacher["scores"]], [*teacher["kl"]]
    heads = ["layers", "way", *tasks, "kept above chance, %", *(f"KL, {kind}" for kind in kinds), "KL, mean"]
    lines = [f"| {' | '.join([*heads, 'trained on', 'repaired on', 'min', 'GiB'])} |", "|" + "---|" * (len(heads) + 4)]
    for row in by_depth(rows):
        share, error = kept(row, teacher)
        cells = [row["layers"], title_of(row), *(f"{row['scores'][task]['value']:.3f}" for task in tasks)]
        cells += [f"{share:.1f}" + f" ± {error:.1f}" * (row is not teacher)]
        cells += [*(f"{row['kl'][kind]:.3f}" for kind in kinds), f"{kl_of(row):.3f}"]
        cells += [f"{row.get(part, 0):,}" for part in ("trained_on", "repaired_on")]
        cells += ["", ""] if row is teacher else [minutes_of(row), f"{row['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each way, depth and number of tokens: means over its seeds, with their standard errors."""
    teacher = teacher_of(rows)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row is not teacher:
            groups.setdefault((-row["layers"], row["way"], row["tokens"]), []).append(row)
    lines = [
        "| layers | way | seeds | kept above chance, % | KL to the teacher | without layers |",
        "|---|---|---|---:|---:|---|",
    ]
    for (depth, _, _), group in sorted(groups.items()):
        shares, kls = ([value(row) for row in group] for value in (lambda row: kept(row, teacher)[0], kl_of))
        removed = "; ".join(
            ", ".join(map(str, sorted(set(range(teacher["layers"])) - set(row["kept"])))) for row in group
        )
        cells = [-depth, title_of({**group[0], "seed": 0}), len(group), mean_of(shares, 1), mean_of(kls, 3), removed]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def brief(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each way at the lowest depth: what is kept, KL, time and memory."""
    teacher = teacher_of(rows)
    lines = ["| way | kept above chance, % | KL to the teacher | minutes | GiB |", "|---|---:|---:|---:|---:|"]
    for row in at_lowest_depth(rows):
        share, error = kept(row, teacher)
        cells = [title_of(row), f"{share:.1f} ± {error:.1f}", f"{kl_of(row):.3f}"]
        cells += [minutes_of(row), f"{row['peak_gib']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far our trained loops are ahead of each way at the lowest depth, in % of the teacher, paired row by row."""
    shown, share = at_lowest_depth(rows), 100 / above_chance(teacher_of(rows))
    ours = [row for row in shown if row["way"] in ("default", "trained-each-round")]
    lines = [f"| {' | '.join(['ahead of', *map(title_of, ours)])} |", "|---|" + "---:|" * len(ours)]
    for other in shown:
        cells = [
            f"{(above_chance(one) - above_chance(other)) * share:+.1f} ± {difference_stderr(one, other) * share:.1f}"
            if one is not other
            else ""
            for one in ours
        ]
        lines.append(f"| {' | '.join([title_of(other), *cells])} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The same as bars: what is kept, with its standard error, and KL; best at the top."""
    teacher = teacher_of(rows)
    shown = at_lowest_depth(rows)
    names, heights = [title_of(row) for row in shown], range(len(shown))
    colours = [COLOURS[0] if row["way"] == "default" else COLOURS[-1] for row in shown]
    with canvas(10.5, 1.1 + 0.36 * len(shown), ncols=2, sharey=True) as (figure, (left, right)):
        shares, errors = zip(*(kept(row, teacher) for row in shown), strict=True)
        left.barh(heights, shares, xerr=errors, color=colours, ecolor=INK)
        left.axvline(100, color=INK, linewidth=0.8, linestyle=":")
        left.set(yticks=[*heights], yticklabels=names, ylim=(len(shown) - 0.5, -0.5))
        left.set_xlabel("kept above chance, %")
        right.barh(heights, [kl_of(row) for row in shown], color=colours)
        right.set_xlabel("KL to the teacher")
        for axes in (left, right):
            axes.grid(axis="x")
    return figure


if __name__ == "__main__":
    main()
