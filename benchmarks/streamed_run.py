"""Peak memory and time of a whole run whose layers stay on the disk, against one in memory.

    python benchmarks/streamed_run.py --out benchmarks/results/streamed-run.json

Writes a random bf16 model of the Llama family (112 layers, 1.5 billion parameters) to a temporary folder, and takes two
layers out of it: scored by teacher_kl, repaired, neighbours trained, evaluated, written; each way in a process of its
own. What counts is the peak resident memory of each (VmHWM), interpreter and libraries with it, how many times longer
streaming takes, and how far scores, losses and the perplexities of students differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from machine import machine
from measuring import finish, measured_apart, write_record
from streamed_training import WAYS, write_text
from streaming import peak_bytes, write_model

from layerpeel.config.reading import parse_config
from layerpeel.run.loop import peel


def main() -> None:
    """Writes the model, runs each way in its own process, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=112)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.way:
        write_record(options.out, run(options.model, options.layers - 2, options.way))
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder), options.layers, options.hidden)
        write_text(Path(folder), 32)
        results = {way: measured_apart(__file__, *sys.argv[1:], "--way", way, "--model", folder) for way in WAYS}
    numbers = {way: results[way].pop("numbers") for way in WAYS}
    record = {
        "command": "python benchmarks/streamed_run.py",
        "machine": machine(),
        "parameters": parameters,
        "layers": options.layers,
        "ways": results,
        "memory_ratio": results["stream"]["peak_bytes"] / results["memory"]["peak_bytes"],
        "time_ratio": results["stream"]["seconds"] / results["memory"]["seconds"],
        "largest_difference": max(abs(a - b) for a, b in zip(*numbers.values(), strict=True)),
    }
    finish(options.out, record)


def run(folder: Path, target: int, way: str) -> dict[str, Any]:
    """A run down to so many layers, on the text beside the model."""
    text = str(folder / "text.jsonl")
    with tempfile.TemporaryDirectory() as output:
        fields = {
            "teacher": str(folder),
            "output": output,
            "dtype": "bfloat16",
            "stop": {"target_layers": target},
            "score": {"decide": "teacher_kl", "tokens": 64, "weights": way},
            "tasks": [{"kind": "perplexity", "data": text, "limit": 2}],
            "distill": {
                "text": text,
                "tokens_per_round": 256,
                "tokens_per_step": 128,
                "sequence_length": 64,
                "train": "neighbours",
                "repair": {"tokens": 512, "ridge": 0.1},
                "weights": way,
            },
        }
        started = time.monotonic()
        done = peel(parse_config(fields, "streamed_run"))
        seconds = time.monotonic() - started
    numbers = [value for each in done.rounds for _, value in sorted(each.scores.importance.items())]
    numbers += [loss for each in done.rounds for loss in (each.training.first_loss, each.training.last_loss)]
    numbers += [score.value for each in done.rounds for score in each.evaluation.scores.values()]
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "numbers": numbers}


if __name__ == "__main__":
    main()
