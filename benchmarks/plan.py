"""Compares what `layerpeel plan` says with runs, and writes the table of well-known shapes.

    python benchmarks/plan.py demo --out plan-demo.json
    python benchmarks/plan.py configs/storyteller.yaml --out plan-storyteller.json
    python benchmarks/plan.py random --processes 1,2,4 --fsdp --out plan-random.json
    python benchmarks/plan.py random --set score.weights=stream --set distill.weights=stream \
        --set distill.train=neighbours --out plan-streamed.json
    python benchmarks/plan.py --table > docs/plan.md

A comparison plans, runs (into a temporary folder, in processes of its own), and writes planned and measured seconds of
scoring and training, seconds in all, and peak memory of each process (VmHWM, interpreter and libraries with it; on a
GPU what torch allocated there), with planned / measured. With `--processes`, once for each number of processes (gloo),
which share the cores; with `--fsdp`, several also with their layers split. `random` is a bf16 Llama of 163 million
random parameters, of which two layers go.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine
from measuring import command_given, hand_in, measured_by_each, write_record
from streamed_training import write_text
from streaming import peak_bytes, write_model
from transformers import Qwen2Config

from layerpeel.config.reading import load_config, parse_config
from layerpeel.config.run import RunConfig
from layerpeel.demo.preparing import prepare_demo
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.plan.planning import Plan, plan_run
from layerpeel.plan.speed import Speed
from layerpeel.processes.text import count, size
from layerpeel.report.gather import costs_of
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel

# The public config.json of each model on the hub.
SHAPES = {
    "Qwen2.5-3B": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-72B": {
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
FLOPS, BANDWIDTH = 4e14, 2e12  # of one GPU
TOKENS = 100_000_000  # of training in each round
# Five-shot tasks of the paper's kinds: how many samples, tokens of each prompt, tokens of each answer.
CHOICES, WRITTEN = (1000, 600, 1), ((100, 1500, 128), (50, 2000, 400), (100, 700, 128), (400, 500, 64))
TABLE = """# Planning a run

`layerpeel plan my.yaml` estimates the memory and time of a run from the teacher's config alone: no weights are read. It
counts the layer calls of scoring, evaluation and training, and multiplies them by times that it measures on one layer
and one head of that shape with random weights; for another machine, give `--flops` and `--bandwidth`. `--gpus 8`
divides the work among eight GPUs, `--fsdp` splits layers, and what trains in them, while they train. Without a GPU, it
is eight processes on the cores of this machine, each with its share of them; start them with as many threads
(`OMP_NUM_THREADS`; `torchrun` gives each process one).

Memory is that of each process, weights with it that processes of one machine share because they are mapped from the
files. With `--fsdp` the end of a training, when weights are whole again, is planned beside its steps. What processes of
a CPU exchange is timed between threads. Not planned are the time that processes take to start and load, and to save the
state of a training; how long processes wait for one another where there are more of them than cores; the kernels' own
workspaces; and what malloc cannot use again of memory that was freed, but for a share of what changes in a step.

Where layers stay on the disk (`weights: stream`), it counts how often they are read, and times that on the checkpoint:
from the system's cache, if the files fit into memory, else from the disk. The next layer is read while one runs, so of
reading and computing the longer one counts; but on a CPU reading takes a core from computing. Of a checkpoint that is
not here yet, and with `--flops`, the disk is taken to read 2 GB a second, unless `--disk` says otherwise. Not counted
is what earlier rounds changed, which is read beside it.

Of {names}, a third of the layers removed: {tokens} tokens a round in rows of
2,048, batches of 2, AdamW on fp32 copies, bfloat16 frozen weights. {share}
This table is what `python benchmarks/plan.py --table` prints; none of it was measured. [Results](results.md) compares
plans with the runs that were made.

{heads}
{rows}

Assumptions:

- each GPU reaches {flops:.0e} operations and {bandwidth:.0e} bytes of memory a second, and so does each of several;
- layers are removed from the middle, as one gap, and no quality floor ends the run earlier;
- the tasks are {choices[0]} choice questions with prompts of {choices[1]} tokens, and {written} texts to be written;
- a prompt runs once for all choices after it; text is generated to its full length; nothing races;
- branches of candidates take 8 GiB (`score.memory`) while the model is scored;
- the frozen weights are whole on each GPU; with FSDP2, layers, embeddings and head are split while a round trains, and
  so are fp32 copies, gradients and AdamW's state; memory of training is that of a step or that at its end, whichever is
  more;
- what GPUs send one another takes no time;
- a step of generation reads the weights once for all rows; memory for the CUDA context, and what an allocator leaves
  unused, comes on top.
"""


HEADS = (
    "model",
    "trained",
    "scored by",
    "GPUs",
    "weights",
    "memory of each, training",
    "memory of each, repair",
    "memory of each, scoring",
    "tokens × layers, scoring",
    "scoring",
    "training",
)


def main() -> None:
    """Prints the table, or compares plans with runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML config, `demo` for that of the bundled teacher, or `random`")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, over the config's")
    parser.add_argument("--processes", default="1", help="numbers of processes, with commas between")
    parser.add_argument("--fsdp", action="store_true", help="several processes once more, with their layers split")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print docs/plan.md")
    parser.add_argument("--peaks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table(), end="")
    elif options.peaks:
        run_here(options.config, options.set, options.peaks)
    elif options.config and options.out:
        record = compare_each(options.config, options.set, _ways(options.processes, split=options.fsdp))
        write_record(options.out, record, indent=1)
    else:
        parser.error("a config and --out are needed, or --table")


def _ways(processes: str, *, split: bool) -> list[tuple[int, bool]]:
    """How many processes, and whether their layers are split."""
    counts = [int(part) for part in processes.split(",")]
    return [(count, False) for count in counts] + [(count, True) for count in counts if split and count > 1]


def compare_each(config: str, overrides: list[str], ways: list[tuple[int, bool]]) -> dict[str, Any]:
    """Plans and runs in each way."""
    runs = []
    for processes, split in ways:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(compare(config, overrides, Path(folder), processes, split=split))
        print(processes, "split" if split else "", json.dumps(runs[-1]["planned_over_measured"]), flush=True)
    return {"command": command_given(), "machine": machine(), "runs": runs}


def compare(config: str, overrides: list[str], folder: Path, processes: int, *, split: bool) -> dict[str, Any]:
    """Plans, runs, and puts both beside each other."""
    prepare = {"demo": prepare_demo, "random": prepare_random}.get(config)
    path = str(prepare(folder)) if prepare else config
    settings = [part for text in [*overrides, f"output={folder / 'run'}"] for part in ("--set", text)]
    sharing = ["--gpus", str(processes), *["--fsdp"] * split]
    command = [sys.executable, "-m", "layerpeel", "plan", path, *settings, *sharing, "--json"]
    planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    threads = max(1, torch.get_num_threads() // processes)
    command = [__file__, path, *settings, "--peaks", str(folder)]
    peaks = measured_by_each(processes, threads, split=split, folder=folder, command=command)
    run = Run(folder / "run")
    costs = costs_of(run)
    seconds = {"scoring": costs.scoring_seconds, "training": costs.training_seconds}
    measured = seconds | {"in all": run.events[-1].time - run.events[0].time}
    expected: dict[str, Any] = {part: planned["seconds"][part] for part in seconds}
    in_all = sum(seconds for part, seconds in planned["seconds"].items() if part != "report")  # the run makes none
    expected |= {"in all": in_all, "peak": planned["peak"]}
    ratios: dict[str, Any] = {part: round(expected[part] / value, 3) for part, value in measured.items() if value}
    ratios["peaks"] = [round(planned["peak"] / peak, 3) for peak in peaks]
    return {
        "processes": processes,
        "split": split,
        "plan": planned,
        "planned": expected,
        "measured": measured | {"peaks": peaks},
        "planned_over_measured": ratios,
    }


def run_here(config: str, overrides: list[str], folder: Path) -> None:
    """Runs a config in this process, and writes the peak of its memory."""
    warnings.filterwarnings("ignore")
    peel(load_config(config, overrides))
    hand_in(folder, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes())


def prepare_random(folder: Path) -> Path:
    """Writes a random teacher, text, and a config that takes two layers out and trains all others."""
    teacher = folder / "teacher"
    teacher.mkdir()
    write_model(teacher, layers=10, hidden=1024)
    write_text(folder, documents=64)
    text = str(folder / "text.jsonl")
    config = {
        "teacher": str(teacher),
        "output": str(folder / "run"),
        "dtype": "bfloat16",
        "stop": {"target_layers": 8},
        "score": {"decide": "teacher_kl", "tokens": 512},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 8}],
        "distill": {
            "text": text,
            "tokens_per_round": 2048,
            "tokens_per_step": 256,
            "sequence_length": 64,
            "batch_size": 1,
            "repair": False,
        },
    }
    path = folder / "random.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def table() -> str:
    """The page docs/plan.md."""
    heads = "\n".join(f"| {' | '.join(line)} |" for line in (HEADS, ["---"] * 3 + ["---:"] * (len(HEADS) - 3)))
    rows = []
    for name, sizes in SHAPES.items():
        for decide, train, gpus in (
            ("teacher_kl", "neighbours", 1),
            ("task_quality", "neighbours", 1),
            ("teacher_kl", "all", 8),
            ("task_quality", "all", 8),
        ):
            planned = plan_shape(sizes, decide, train, gpus)
            rows.append(
                "| "
                + " | ".join(
                    [
                        name,
                        train,
                        decide,
                        str(gpus) + (" (FSDP2)" if gpus > 1 else ""),
                        size(planned.shape.parameters * planned.shape.itemsize),
                        size(max(sum(planned.training_memory.values()), sum(planned.end_memory.values()))),
                        size(sum(planned.repair_memory.values())),
                        size(sum(planned.scoring_memory.values())),
                        count(planned.layer_tokens["scoring"]),
                        hours(planned.seconds["scoring"]),
                        hours(planned.seconds["training"]),
                    ]
                )
                + " |"
            )
    return TABLE.format(
        names=", ".join(SHAPES),
        heads=heads,
        tokens=f"{TOKENS:,}",
        rows="\n".join(rows),
        flops=FLOPS,
        bandwidth=BANDWIDTH,
        choices=CHOICES,
        written=sum(samples for samples, _, _ in WRITTEN),
        share="`neighbours` trains the layers beside the gap (the paper), `all` every layer that is left, with "
        "activation checkpointing. After each removal the gap is repaired.",
    )


def plan_shape(sizes: dict[str, Any], decide: str, train: str, gpus: int) -> Plan:
    """A third of a shape's layers, as the paper did it."""
    teacher = Qwen2Config(**sizes, max_position_embeddings=32_768)
    config: RunConfig = parse_config(
        {
            "teacher": "none",
            "output": "none",
            "stop": {"target_layers": teacher.num_hidden_layers * 2 // 3},
            "score": {"decide": decide},
            "tasks": [{"kind": "perplexity", "data": "none"}],
            "distill": {
                "text": "none",
                "tokens_per_round": TOKENS,
                "sequence_length": 2048,
                "tokens_per_step": 8 * 2048 * gpus,
                "batch_size": 2,
                "train": train,
                "activation_checkpointing": train == "all",
            },
        },
        "the table",
    )
    return plan_run(
        teacher,
        config,
        requests(),
        lambda shape: Speed.of_processor(shape, FLOPS, BANDWIDTH, config.distill),
        dtype=torch.bfloat16,
        device="cuda",
        gpus=gpus,
        fsdp=gpus > 1,
    )


def requests() -> list[list[Request]]:
    """Tasks of the paper's kinds and sizes; no two prompts are alike."""
    samples, prompt, answer = CHOICES
    asked: list[Request] = [
        LogLikelihood((sample, *[0] * (prompt - 1)), (choice,) * answer)
        for sample in range(samples)
        for choice in range(4)
    ]
    return [asked, *([Generation((0,) * length, new, ())] * samples for samples, length, new in WRITTEN)]


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:,.1f} min"


if __name__ == "__main__":
    main()
