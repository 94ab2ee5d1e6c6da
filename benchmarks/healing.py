"""Compares ways to heal the same gap at equal tokens, by what is left of the KL to the teacher on held-out text.

    python benchmarks/healing.py --seeds 0,1,2
    python benchmarks/healing.py --real --variants untrained,paper,default --tokens 300_000

storyteller-18 without layers 3, 5, 6, 7: stories and copies, English and Russian. With --real, SmolLM2-135M (or another
model in the folder that follows) without six of its thirty layers, in bfloat16: web text, Wikipedia, Stack Exchange.
A variant is fields of `distill`; each runs in a process of its own, for its peak of memory. What is in the file already
with the same fields, tokens and seed is not run again. What the teacher writes is kept in runs/healing, and its time is
not counted. Prints a Markdown table, and writes what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from distillation import peak_gib
from machine import machine
from measuring import KIT, ROOT, measured_side_by_side, share_gpu, write_record
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.distill import DistillConfig
from layerpeel.data.tokenizing import encode_text
from layerpeel.inference.teacher_text import TeacherWriter
from layerpeel.model.loading import load_model
from layerpeel.training.repairing import repair_student
from layerpeel.training.result import RepairResult, TrainingResult
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student

REAL = "~/.cache/layerpeel-kit/smollm2-135m"
LONGEST = 512  # tokens of a held-out text that are read


@dataclass(frozen=True)
class Setting:
    """A teacher, the gap, and what is read.

    Attributes:
        removed: teacher layers, in the order in which they go where they go one by one.
        dtype: of the frozen weights.
        tokens: of training, where `--tokens` does not say.
        text: fields of `distill` that say what text in which rows.
        step: fields that say how large a step is.
        rate: fields that say how long one is.
        held_out: files by what they hold.
        texts: how many of each.
    """

    teacher: Path
    removed: tuple[int, ...]
    dtype: str
    tokens: int
    text: dict[str, Any]
    step: dict[str, Any]
    rate: dict[str, Any]
    held_out: dict[str, Path]
    texts: int


def storyteller() -> Setting:
    """The kit's teacher of 18 layers."""
    stories = KIT / "eval" / "stories"
    return Setting(
        teacher=KIT / "models" / "storyteller-18",
        removed=(6, 7, 5, 3),
        dtype="float32",
        tokens=200_000,
        text={
            "text": [str(KIT / "text" / name) for name in ("tinystories_2M.txt", "stories_ru.jsonl")],
            "sequence_length": 256,
        },
        step=rows(2),
        rate={"learning_rate": 3e-4},
        held_out={
            "English stories": stories / "stories_en.jsonl",
            "English copies": stories / "copy_en.jsonl",
            "Russian stories": stories / "stories_ru.jsonl",
            "Russian copies": stories / "copy_ru.jsonl",
        },
        texts=60,
    )


def real(folder: Path) -> Setting:
    """SmolLM2-135M, or another published model of thirty layers or more."""
    texts = KIT / "real" / "eval"
    return Setting(
        teacher=folder,
        removed=(17, 14, 5, 26, 25, 12),
        dtype="bfloat16",
        tokens=300_000,
        text={"text": str(KIT / "real" / "text" / "general_en.jsonl"), "sequence_length": 512},
        step=rows(1),
        rate={"learning_rate": 1e-4},
        held_out={
            "web": texts / "ppl_web_c4.jsonl",
            "wiki": texts / "ppl_wiki_en.jsonl",
            "stackexchange": texts / "ppl_stackexchange.jsonl",
        },
        texts=20,
    )


def rows(number: int) -> dict[str, Any]:
    """A step of so many full rows; `config_of` makes tokens of them."""
    return {"rows": number}


@dataclass(frozen=True)
class Variant:
    """Fields of `distill`, over the package's defaults, or the setting's step, or its step and learning rate.

    Attributes:
        over: `defaults`, `step` or `tuned`.
        one_by_one: remove a layer, train, remove the next, as a run does; else all go at once.
        text: the setting's `corpus`, what the `teacher` writes, as many documents of `both`, or `more` of the latter:
            three for each.
    """

    fields: dict[str, Any]
    over: str = "tuned"
    one_by_one: bool = False
    text: str = "corpus"


def losses(hidden_mse: dict[str, Any] | None = None) -> dict[str, Any]:
    """KL and, unless left out, the loss on hidden states with these options."""
    return {"losses": {"kl": {}} | ({} if hidden_mse is None else {"hidden_mse": hidden_mse})}


STEADY = {"lr_scheduler_type": "constant_with_warmup"}
GENTLE_END = {"when": "half", "last_pass": {"learning_rate": 1e-4}}
VARIANTS: dict[str, Variant] = {
    "untrained": Variant({"tokens_per_round": 0, "repair": False}, over="defaults"),
    "repair-alone": Variant({"tokens_per_round": 0}, over="defaults"),
    "repair-alone-32k": Variant({"tokens_per_round": 0, "repair": {"tokens": 32_768}}, over="defaults"),
    "repair-alone-ridge-0.1": Variant({"tokens_per_round": 0, "repair": {"ridge": 0.1}}, over="defaults"),
    "repair-alone-teacher-text": Variant({"tokens_per_round": 0}, over="defaults", text="teacher"),
    "repair-alone-both-texts": Variant({"tokens_per_round": 0}, over="defaults", text="both"),
    "repair-alone-more-teacher-text": Variant({"tokens_per_round": 0}, over="defaults", text="more"),
    "repair-alone-both-texts-ridge-0.1": Variant(
        {"tokens_per_round": 0, "repair": {"ridge": 0.1}}, over="defaults", text="both"
    ),
    "repair-alone-both-texts-ridge-0.3": Variant(
        {"tokens_per_round": 0, "repair": {"ridge": 0.3}}, over="defaults", text="both"
    ),
    "repair-alone-ridge-0.5": Variant({"tokens_per_round": 0, "repair": {"ridge": 0.5}}, over="defaults"),
    "paper": Variant({"preset": "paper", **rows(8)}, over="defaults"),
    "paper-small-steps": Variant({"preset": "paper"}, over="step"),
    "default": Variant({}, over="defaults"),
    "default-without-repair": Variant({"repair": False}, over="defaults"),
    "repaired": Variant({"repair": {}}),
    "repaired-lr-1e-4": Variant({"repair": {}, "learning_rate": 1e-4}),
    "repaired-lr-5e-5": Variant({"repair": {}, "learning_rate": 5e-5}),
    "repaired-lr-3e-4": Variant({"repair": {}, "learning_rate": 3e-4}),
    "repaired-ridge-0.5": Variant({"repair": {"ridge": 0.5}}),
    "repaired-averaged": Variant({"repair": {}, "average_last": 0.25}),
    "tuned": Variant({"train": "all", **losses({})}),
    "lr-3e-5": Variant({"learning_rate": 3e-5}),
    "lr-1e-4": Variant({"learning_rate": 1e-4}),
    "lr-2e-4": Variant({"learning_rate": 2e-4}),
    "lr-3e-4": Variant({"learning_rate": 3e-4}),
    "lr-5e-4": Variant({"learning_rate": 5e-4}),
    "lr-1e-3": Variant({"learning_rate": 1e-3}),
    "rows-1": Variant(rows(1)),
    "rows-2": Variant(rows(2)),
    "rows-4": Variant(rows(4)),
    "rows-8": Variant(rows(8)),
    "neighbours": Variant({"train": "neighbours"}),
    "above": Variant({"train": "above"}),
    "head": Variant({"train_norm": True, "train_head": True}),
    "kl-alone": Variant(losses()),
    "hidden-0.1": Variant(losses({"weight": 0.1})),
    "hidden-all-layers": Variant(losses({"layers": "all"})),
    "muon": Variant({"optimizer": "Muon"}),
    "default-kl-alone": Variant(losses(), over="defaults"),
    "default-hidden-3": Variant(losses({"weight": 3.0}), over="defaults"),
    "default-hidden-all-layers-3": Variant(losses({"weight": 3.0, "layers": "all"}), over="defaults"),
    "default-muon": Variant({"optimizer": "Muon"}, over="defaults"),
    "default-lr-2e-4": Variant({"learning_rate": 2e-4}, over="defaults"),
    "default-lr-5e-5": Variant({"learning_rate": 5e-5}, over="defaults"),
    "default-repaired-on-all": Variant({"repair": {"tokens": 1_000_000}}, over="defaults"),
    "default-averaged": Variant({"average_last": 0.25}, over="defaults"),
    "default-steps-of-512": Variant({"tokens_per_step": 512}, over="defaults"),
    "linear": Variant({"lr_scheduler_type": "linear"}),
    "no-warmup": Variant({"warmup_steps": 0}),
    "average-last-quarter": Variant({"average_last": 0.25}),
    "steady": Variant(STEADY),
    "steady-average-last-quarter": Variant({"average_last": 0.25, **STEADY}),
    "steady-average-last-half": Variant({"average_last": 0.5, **STEADY}),
    "unpacked": Variant({"packing": "none"}),
    "wrapped": Variant({"packing": "wrapped"}),
    "teacher-text": Variant({"repair": {}}, text="teacher"),
    "default-teacher-text": Variant({}, over="defaults", text="teacher"),
    "default-both-texts": Variant({}, over="defaults", text="both"),
    "default-more-teacher-text": Variant({}, over="defaults", text="more"),
    "both-texts-lr-3e-4": Variant({"learning_rate": 3e-4}, over="defaults", text="both"),
    "both-texts-ridge-0.3": Variant({"repair": {"ridge": 0.3}}, over="defaults", text="both"),
    "both-texts-ridge-1": Variant({"repair": {"ridge": 1.0}}, over="defaults", text="both"),
    "both-texts-lr-2e-4": Variant({"learning_rate": 2e-4}, over="defaults", text="both"),
    "both-texts-hidden-3": Variant(losses({"weight": 3.0}), over="defaults", text="both"),
    "both-texts-hidden-all-layers": Variant(losses({"layers": "all"}), over="defaults", text="both"),
    "both-texts-hidden-all-layers-3": Variant(losses({"weight": 3.0, "layers": "all"}), over="defaults", text="both"),
    "hidden-all-layers-3-lr-1.5e-4-rows-1": Variant(
        {"learning_rate": 1.5e-4, **rows(1), **losses({"weight": 3.0, "layers": "all"})}, over="defaults"
    ),
    "text-and-teacher-text": Variant({"repair": {}}, text="both"),
    "in-rounds": Variant({"repair": {}, "when": "each_round"}, one_by_one=True),
    "half-at-the-end": Variant({"repair": {}, "when": "half"}, one_by_one=True),
    "half-gentle-at-the-end": Variant({"repair": {}, **GENTLE_END}, one_by_one=True),
    "at-the-end": Variant({"repair": {}, "when": "end"}, one_by_one=True),
}


def config_of(setting: Setting, variant: Variant, tokens: int) -> DistillConfig:
    """How the variant trains, on so many tokens in all."""
    rounds = len(setting.removed) if variant.one_by_one else 1
    tuned = {"repair": False, **setting.step, **setting.rate}
    over = {"defaults": {}, "step": setting.step, "tuned": tuned}[variant.over]
    budget = {"tokens_per_round": tokens // rounds}
    fields = {**budget, **setting.text, **over, **variant.fields}
    corpus = fields["text"] if isinstance(fields["text"], list) else [fields["text"]]
    written = [{"from": "teacher", "weight": len(corpus) * (3 if variant.text == "more" else 1)}]
    fields["text"] = corpus * (variant.text != "teacher") + written * (variant.text != "corpus")
    if number := fields.pop("rows", None):
        fields["tokens_per_step"] = number * fields["sequence_length"]
    return DistillConfig.model_validate(fields)


def settings_of(setting: Setting, variant: Variant, tokens: int) -> dict[str, Any]:
    """All that a measurement depends on, but for its seed and the code, without the places of files."""
    return {
        "teacher": setting.teacher.name,
        "dtype": setting.dtype,
        "removed": list(setting.removed),
        "one_by_one": variant.one_by_one,
        "held_out": {kind: path.name for kind, path in setting.held_out.items()},
        "texts": setting.texts,
        "longest": LONGEST,
        "distill": without_places(config_of(setting, variant, tokens).model_dump(mode="json")),
    }


def without_places(value: Any) -> Any:
    """The same, where paths are names of files."""
    if isinstance(value, Mapping):
        return {key: Path(each).name if key == "path" else without_places(each) for key, each in value.items()}
    return [without_places(each) for each in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is not in the file yet, one variant and seed after another."""
    options = read_options(arguments)
    setting = real(Path(options.real).expanduser()) if options.real else storyteller()
    tokens = options.tokens or setting.tokens
    if options.worker:
        share_gpu(options.at_once)
        measured = measure(setting, VARIANTS[options.worker], tokens, options.seeds[0])
        options.out.write_text(json.dumps(measured), encoding="utf-8")
        return
    out = options.out or ROOT / "benchmarks" / "results" / f"healing-{setting.teacher.name}.json"
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    wanted = []
    for seed in options.seeds:
        for name in options.variants:
            settings = json.loads(json.dumps(settings_of(setting, VARIANTS[name], tokens)))
            key = {"variant": name, "seed": seed, "tokens": tokens}
            if not any(
                key | {"settings": settings} == {part: run[part] for part in (*key, "settings")} for run in runs
            ):
                wanted.append((key, settings))
    where = ["--real", options.real] if options.real else []
    jobs = [["--worker", key["variant"], "--seeds", key["seed"], "--tokens", tokens, *where] for key, _ in wanted]
    for number, measured in measured_side_by_side(__file__, jobs, options.at_once):
        key, settings = wanted[number]
        alone = {} if options.at_once == 1 else {"seconds": None}
        runs = [run for run in runs if key != {part: run[part] for part in key}]
        runs.append(key | measured | alone | {"machine": machine(), "settings": settings})
        write(out, runs, options)
        print(*key.values(), {kind: round(value, 4) for kind, value in measured["kl"].items()}, flush=True)
    print(markdown(runs, tokens))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs="?", const=REAL, help=f"a published model; {REAL} if no folder follows")
    parser.add_argument("--tokens", type=int, help="of training in all; 200_000, or 300_000 with --real")
    parser.add_argument(
        "--variants", type=names_among("variant", VARIANTS), default=[*VARIANTS], help=", ".join(VARIANTS)
    )
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--at-once", type=int, default=1, help="variants that run side by side; no seconds are kept")
    parser.add_argument("--out", type=Path, help="benchmarks/results/healing-TEACHER.json, if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def names_among(noun: str, known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Reads names by commas, of those that are known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {noun} {unknown[0]}; there are {', '.join(known)}")
        return names

    return parse


def measure(setting: Setting, variant: Variant, tokens: int, seed: int) -> dict[str, Any]:
    """Heals the gap, and measures what is left.

    Returns:
        `kl` by kind of text; `seconds` of repair and training; their real tokens, `repaired_on` and `trained_on`;
        `steps`; and the peak of memory, sampling included where the teacher's text was not there yet.
    """
    teacher, tokenizer = load_model(setting.teacher, dtype=setting.dtype)
    config = with_text(config_of(setting, variant, tokens), teacher, tokenizer, setting)
    started = time.monotonic()
    student, repairs, trainings = heal(teacher, tokenizer, groups_of(setting, variant), config, seed)
    seconds, peak = time.monotonic() - started, peak_gib(teacher.device)
    texts = {kind: read(path, tokenizer, setting.texts) for kind, path in setting.held_out.items()}
    return {
        "kl": {kind: mean_kl(student, teacher, each) for kind, each in texts.items()},
        "seconds": seconds,
        "peak_gib": peak,
        "steps": sum(training.steps for training in trainings),
        "repaired_on": sum(repair.tokens for repair in repairs),
        "trained_on": sum(training.tokens for training in trainings),
    }


def with_text(
    config: DistillConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting
) -> DistillConfig:
    """The config with what the teacher is to write, written; the same text for all seeds, as a corpus is."""
    writer = TeacherWriter(
        teacher,
        tokenizer,
        Path("runs/healing"),
        teacher=setting.teacher.name,
        length=config.sequence_length,
        tokens=config.text_tokens(1),
    )
    return config.model_copy(update={"text": writer.resolve(config.text)})


def groups_of(setting: Setting, variant: Variant) -> list[list[int]]:
    """The layers that go in each round."""
    return [[layer] for layer in setting.removed] if variant.one_by_one else [[*setting.removed]]


def heal(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[int]],
    config: DistillConfig,
    seed: int,
) -> tuple[PreTrainedModel, list[RepairResult], list[TrainingResult]]:
    """The student, repaired and trained as in a run in whose rounds these groups of layers go."""
    student, repairs, trainings = Student(teacher), list[RepairResult](), list[TrainingResult]()

    def train(distill: DistillConfig) -> None:
        before = [training.summary() for training in trainings]
        number = 1 + len(trainings)
        options: dict[str, Any] = {"seed": seed, "round_number": number, "before": before, "storage": teacher.dtype}
        trainings.append(train_student(student, tokenizer, distill, **options))

    for layers in groups:
        student.remove(layers)
        if repair := repair_student(student, tokenizer, config, layers, seed=seed, storage=teacher.dtype):
            repairs.append(repair)
        train(config.in_rounds())
    if last := config.at_end(len(groups)):
        train(last)
    return student.model, repairs, trainings


def read(path: Path, tokenizer: PreTrainedTokenizerBase, texts: int) -> list[Tensor]:
    """Token ids of the first texts of a file, each cut to `LONGEST`; a copy is its prompt and what should follow."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:texts]]
    written = [line["text"] if "text" in line else line["prompt"] + line["target"] for line in lines]
    return [torch.tensor(encode_text(tokenizer, text)[:LONGEST]) for text in written]


@torch.no_grad()
def mean_kl(student: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Tensor]) -> float:
    """KL(teacher || student) of the next token, mean over all tokens of the texts."""
    total = 0.0
    for ids in texts:
        one, other = (model(ids[None].to(model.device)).logits[0].float() for model in (student, teacher))
        divergence = functional.kl_div(one.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum")
        total += float(divergence)
    return total / sum(map(len, texts))


def write(out: Path, runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Writes all runs, whole or not at all, in the order of `VARIANTS`."""
    order = [*VARIANTS]
    known = [run for run in runs if run["variant"] in order]
    ordered = sorted(known, key=lambda run: (run["tokens"], order.index(run["variant"]), run["seed"]))
    command = "python benchmarks/healing.py" + " --real" * bool(options.real)
    record = {"command": command, "machine": ", or ".join(sorted({run["machine"] for run in runs})), "runs": ordered}
    write_record(out, record, indent=1)


def markdown(runs: Sequence[Mapping[str, Any]], tokens: int) -> str:
    """One line a variant, at so many tokens: means over its seeds, and how far these are apart."""
    chosen = [run for run in runs if run["tokens"] == tokens]
    kinds = list(chosen[0]["kl"])
    heads = ["variant", "fields", *(f"KL, {kind}" for kind in kinds), "mean", "seeds", "repaired on", "trained on"]
    lines = [f"| {' | '.join([*heads, 'steps', 's', 'GiB'])} |", "|" + "---|" * (len(heads) + 3)]
    for name, variant in VARIANTS.items():
        same = [run for run in chosen if run["variant"] == name]
        if not same:
            continue
        means = [statistics.mean(run["kl"][kind] for run in same) for kind in kinds]
        over = [statistics.mean(run["kl"].values()) for run in same]
        cells = [name, f"`{fields_of(variant)}`", *(f"{value:.3f}" for value in means)]
        cells += [mean_of(over, 4), len(same)]
        cells += [f"{same[0][part]:,}" for part in ("repaired_on", "trained_on", "steps")]
        seconds = [run["seconds"] for run in same if run["seconds"] is not None]
        cells += [f"{statistics.mean(seconds):.0f}" if seconds else "", f"{max(run['peak_gib'] for run in same):.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def mean_of(values: Sequence[float], digits: int) -> str:
    """With its standard error, where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def fields_of(variant: Variant) -> str:
    """What a variant changes, in YAML."""
    texts = {"teacher": "teacher's", "both": "corpus and teacher's", "more": "corpus and three times the teacher's"}
    text = {"text": texts[variant.text]} if variant.text in texts else {}
    return yaml.safe_dump(variant.fields | text, default_flow_style=True, width=1000, sort_keys=False).strip()


if __name__ == "__main__":
    main()
