"""Compares what `layerpeel plan` says with runs, and writes the table of well-known shapes.

    python benchmarks/plan.py demo --out plan-demo.json
    python benchmarks/plan.py configs/storyteller.yaml --out plan-storyteller.json
    python benchmarks/plan.py --table > docs/plan.md

A comparison plans, runs (into a temporary folder, each in a process of its own), and writes planned and measured
seconds of scoring and training, seconds in all, and peak memory of the whole process, with planned / measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import Qwen2Config

from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.demo.preparing import prepare_demo
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.plan.planning import Plan, plan_run
from layerpeel.plan.speed import Speed
from layerpeel.processes.text import count, size
from layerpeel.report.gather import costs_of
from layerpeel.run.folder import Run

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
divides the work among eight GPUs, `--fsdp` splits layers, and what trains in them, while they train.

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
  so are fp32 copies, gradients and AdamW's state;
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
    "memory of each, scoring",
    "tokens × layers, scoring",
    "scoring",
    "training",
)


def main() -> None:
    """Prints the table, or compares a plan with a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML config, or `demo` for that of the bundled teacher")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, over the config's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print docs/plan.md")
    options = parser.parse_args()
    if options.table:
        print(table(), end="")
        return
    if not options.config or not options.out:
        parser.error("a config and --out are needed, or --table")
    with tempfile.TemporaryDirectory() as folder:
        record = compare(options.config, options.set, Path(folder))
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["planned_over_measured"], indent=1))


def compare(config: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Plans, runs, and puts both beside each other."""
    path = str(prepare_demo(folder)) if config == "demo" else config
    settings = [part for text in [*overrides, f"output={folder / 'run'}"] for part in ("--set", text)]
    layerpeel = [sys.executable, "-m", "layerpeel"]
    command = [*layerpeel, "plan", path, *settings, "--json"]
    planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the plan, to be sure that the run is larger
    subprocess.run([*layerpeel, "run", path, *settings, "--no-report", "--json"], check=True, stdout=subprocess.DEVNULL)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    run = Run(folder / "run")
    costs = costs_of(run)
    seconds = {"scoring": costs.scoring_seconds, "training": costs.training_seconds}
    measured = seconds | {"in all": run.events[-1].time - run.events[0].time, "peak": peak}
    expected = {part: planned["seconds"][part] for part in seconds}
    in_all = sum(seconds for part, seconds in planned["seconds"].items() if part != "report")  # the run makes none
    expected |= {"in all": in_all, "peak": planned["peak"]}
    return {
        "command": f"python benchmarks/plan.py {config}" + "".join(f" --set {text}" for text in overrides),
        "machine": machine(),
        "plan": planned,
        "peak_is_of_the_run": peak > 1024 * before,
        "planned": expected,
        "measured": measured,
        "planned_over_measured": {part: round(expected[part] / value, 3) for part, value in measured.items() if value},
    }


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
                        size(sum(planned.training_memory.values())),
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
        share="`neighbours` trains the layers beside the gap (the paper), `all` every layer that is left.",
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
