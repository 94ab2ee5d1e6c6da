"""Peak memory and time of training with frozen layers that stay on the disk, against training with all in memory.

    python benchmarks/streamed_training.py --out benchmarks/results/streamed-training.json

Writes a random bf16 model of the Llama family (112 layers, 1.5 billion parameters) to a temporary folder, takes out a
layer and trains its neighbours for a few steps, each way in a process of its own. What counts is the peak resident
memory of each (VmHWM), interpreter and libraries with it, how many times longer streaming takes, and how far the losses
differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from machine import machine
from measuring import finish, measured_apart, write_record
from streaming import peak_bytes, write_model

from layerpeel.config.distill import DistillConfig
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import load_streamed
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student

WAYS = ("memory", "stream")


def main() -> None:
    """Writes the model, trains each way in its own process, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=112)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step-tokens", type=int, default=128)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.way:
        tokens = options.step_tokens
        measured = train(options.model, options.layers, options.steps, tokens, stream=options.way == "stream")
        write_record(options.out, measured)
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder), options.layers, options.hidden)
        write_text(Path(folder), options.steps * options.step_tokens // 64 + 1)
        results = {way: measured_apart(__file__, *sys.argv[1:], "--way", way, "--model", folder) for way in WAYS}
    losses = {way: results[way].pop("losses") for way in WAYS}
    record = {
        "command": "python benchmarks/streamed_training.py",
        "machine": machine(),
        "parameters": parameters,
        "ways": results,
        "memory_ratio": results["stream"]["peak_bytes"] / results["memory"]["peak_bytes"],
        "time_ratio": results["stream"]["seconds"] / results["memory"]["seconds"],
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }
    finish(options.out, record)


def write_text(folder: Path, documents: int) -> None:
    """Writes documents of 64 tokens beside the model."""
    lines = [json.dumps({"text": " ".join(["word"] * 64)})] * documents
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")


def train(
    folder: Path, layers: int, steps: int, step_tokens: int, *, stream: bool, batch_size: int = 16
) -> dict[str, Any]:
    """Loads the model, and trains the neighbours of its middle layer, which goes, on the text beside it."""
    if stream:
        files, tokenizer = load_streamed(folder, device="cpu", dtype="bfloat16")
        student = Student(LayerwiseModel(files.model, files.weights_loaded, files.drop_read_ahead))
    else:
        model, tokenizer = load_model(folder, device="cpu", dtype="bfloat16")
        student = Student(model)
    student.remove([layers // 2])
    config = DistillConfig(
        text=str(folder / "text.jsonl"),  # type: ignore[arg-type]
        tokens_per_round=steps * step_tokens,
        tokens_per_step=step_tokens,
        sequence_length=64,
        batch_size=batch_size,
        train="neighbours",
        repair=False,
    )
    started = time.monotonic()
    result = train_student(student, tokenizer, config, storage=student.model.dtype)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "losses": [point["loss"] for point in result.curve]}


if __name__ == "__main__":
    main()
