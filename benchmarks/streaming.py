"""Peak memory of scoring a model whose layers stay on the disk, against loading it.

    python benchmarks/streaming.py --out results.json

Writes a random bf16 model of the Llama family (48 layers, 1.5 billion parameters) to a temporary folder, and scores it
by teacher_kl, each way in a process of its own: streamed (the next layer is read while one computes), in turn (each
layer is read when it is wanted) and in memory; another loads it and reads each weight once (until then it is only
mapped).
What counts is the peak resident memory of each (VmHWM), interpreter and libraries with it; and how many times longer
than in memory the others take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from machine import machine
from measuring import command_given, finish, measured_apart, write_record
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import load_streamed

WAYS = ("load", "stream", "in_turn", "memory")


class InTurn:
    """Stands in for the thread that reads ahead: reads what is waited for, and nothing before."""

    def submit(self, read: Callable[..., Any], *arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(result=lambda: read(*arguments))


def main() -> None:
    """Writes the model, runs each way in its own process, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of text to score on")
    parser.add_argument("--memory", default=None, help="score.memory; the default if not given")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.way:
        write_record(options.out, run(options.way, options.model, options.tokens, options.memory))
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder), options.layers, options.hidden)
        print(f"{parameters / 1e9:.2f} billion parameters", flush=True)
        results = {}
        for way in WAYS:
            results[way] = measured_apart(__file__, *sys.argv[1:], "--way", way, "--model", folder)
            print(way, {name: value for name, value in results[way].items() if name != "importance"}, flush=True)
    streamed, _, loaded = (results[way].pop("importance") for way in ("stream", "in_turn", "memory"))
    record = {
        "command": command_given(),
        "machine": machine(),
        "parameters": parameters,
        "ways": results,
        "ratio": results["stream"]["peak_bytes"] / results["load"]["peak_bytes"],
        "times_in_memory": {
            way: results[way]["seconds"] / results["memory"]["seconds"] for way in ("stream", "in_turn")
        },
        "candidates": len(loaded),
        "same_scores": streamed == loaded,
        "largest_difference": max(abs(streamed[layer] - loaded[layer]) for layer in loaded),
    }
    finish(options.out, record)


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """Writes a random model, a layer a file, and a tokenizer; gives its number of parameters."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 10 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight":
            continue  # the embedding's
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = parameter.shape
    for group, shapes in groups.items():
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02 for name, shape in shapes.items()
        }
        save_file(
            {name: tensor.bfloat16() for name, tensor in tensors.items()},
            folder / f"model-{group}.safetensors",
            metadata={"format": "pt"},
        )
    weight_map = {name: f"model-{group}.safetensors" for group, shapes in groups.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return sum(shape.numel() for shapes in groups.values() for shape in shapes.values())


def run(way: str, folder: Path, tokens: int, memory: str | None) -> dict[str, Any]:
    """Loads the model and, unless that is all, scores it."""
    started = time.monotonic()
    importance: dict[str, float] = {}
    if way in ("stream", "in_turn"):
        files, tokenizer = load_streamed(folder, device="cpu", dtype="bfloat16")
        if way == "in_turn":
            files._reader = InTurn()  # type: ignore[assignment]
        model: Any = LayerwiseModel(files.model, files.weights_loaded)
    else:
        model, tokenizer = load_model(folder, device="cpu", dtype="bfloat16")
    if way == "load":
        for parameter in model.parameters():
            parameter.sum()
    else:
        ids = torch.randint(2, 32_000, (max(1, tokens // 128), 128), generator=torch.Generator().manual_seed(0))
        config = ScoreConfig(decide="teacher_kl", memory=memory)  # type: ignore[arg-type]
        scores = score_layers(model, tokenizer, config, text=Rows(ids, torch.ones_like(ids).bool()))
        importance = {str(layer): value for layer, value in scores.importance.items()}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": peak_bytes(),
        "importance": importance,
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
