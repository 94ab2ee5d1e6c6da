"""Whether memory stays level over many rounds: 40 random layers of the demo's width, less one in each of 30 rounds.

    python benchmarks/level_memory.py            (a few minutes on one core)

Prints the process's memory after each round, and its growth since round 5, which must be under 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.demo.preparing import TEACHER
from layerpeel.run.loop import peel
from layerpeel.run.writing import OpenRun

SETTLED, MOST = 5, 0.02  # rounds until all is allocated that a round needs; growth after that


def config_of(folder: Path, layers: int, rounds: int) -> RunConfig:
    """A run on a random teacher that scores, trains, saves and evaluates in each round."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **size))
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    lines = [" ".join(f"word {(7 * line + k * k) % 97}" for k in range(40)) for line in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return parse_config(
        {
            "teacher": str(folder / "teacher"),
            "output": str(folder / "run"),
            "stop": {"target_layers": layers - rounds},
            "score": {"decide": "task_quality", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 256},
            "tasks": [{"kind": "perplexity", "data": str(folder / "text.jsonl"), "limit": 4}],
            "distill": {
                "text": str(folder / "text.jsonl"),
                "tokens_per_round": 1024,
                "sequence_length": 64,
                "tokens_per_step": 256,
                "save_every": 0,
            },
        },
        "level_memory",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    process, sizes, record = psutil.Process(), list[int](), OpenRun.record_round

    def watched(run: OpenRun, *arguments: Any) -> None:
        record(run, *arguments)
        sizes.append(process.memory_info().rss)
        print(f"round {len(sizes):2}: {sizes[-1] / 2**20:.0f} MiB", file=sys.stderr)

    OpenRun.record_round = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        peel(config_of(Path(folder), options.layers, options.rounds))
    growth = max(sizes[SETTLED:]) / max(sizes[:SETTLED]) - 1
    early = max(sizes[:SETTLED]) / 2**20
    print(
        f"{len(sizes)} rounds, {early:.0f} MiB by round {SETTLED}, the most after it {growth:+.1%}, at the end "
        f"{sizes[-1] / 2**20:.0f} MiB"
    )
    return int(growth > MOST)


if __name__ == "__main__":
    sys.exit(main())
