"""Peak memory of each of four processes that split a model between them, against one that trains it alone.

    python benchmarks/sharded_training.py --out benchmarks/results/sharded-training.json

Writes a random bf16 model of the Llama family (48 layers, 1.5 billion parameters) to a temporary folder, takes out a
layer and trains its neighbours for a few steps: in one process with all weights in memory, and in four (gloo) under
FSDP2 with `weights: stream`, which read each layer once and keep a quarter of it. What counts is the peak resident
memory of each process (VmHWM), interpreter and libraries with it, and how far the losses differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from machine import machine
from measuring import command_given, finish, hand_in, measured_by_each
from streamed_training import train, write_text
from streaming import write_model

BAR = 0.45  # of one process's peak, at most


def main() -> None:
    """Writes the model, trains it in one process and in several, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.train_in:
        train_here(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder, options.layers, options.hidden)
        write_text(folder, options.steps * options.processes + 1)
        command = [__file__, *sys.argv[1:], "--train-in", str(folder)]
        (alone,), several = (
            measured_by_each(count, 1, split=True, folder=folder, command=command) for count in (1, options.processes)
        )
    differences = [abs(a - b) for each in several for a, b in zip(alone["losses"], each["losses"], strict=True)]
    peak = max(each["peak_bytes"] for each in several)
    record = {
        "command": command_given(),
        "machine": machine(),
        "parameters": parameters,
        "one_process": alone,
        "processes": several,
        "peak_ratio": peak / alone["peak_bytes"],
        "bar": BAR,
        "largest_difference_of_losses": max(differences),
    }
    finish(options.out, record)


def train_here(options: argparse.Namespace) -> None:
    """Trains, and writes what this process took beside the model."""
    folder: Path = options.train_in
    several = torch.distributed.is_torchelastic_launched()
    tokens = 64 * options.processes
    # One row at a time: the same in one process and in each of several.
    record = train(folder, options.layers, options.steps, tokens, stream=several, batch_size=1)
    hand_in(folder, record)


if __name__ == "__main__":
    main()
