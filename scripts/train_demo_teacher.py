"""Trains the bundled teacher on the small world, from scratch, with a fixed seed.

    python scripts/train_demo_teacher.py

Writes src/layerpeel/demo/teacher/: weights (bfloat16), config, tokenizer, training_curve.json, scores.json, SHA256SUMS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from layerpeel.config.reading import load_config
from layerpeel.demo.preparing import prepare_demo
from layerpeel.demo.world import World, make_tokenizer
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.run.results_json import evaluation_to_json
from layerpeel.tasks.evaluation import evaluate, score_tasks
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "src" / "layerpeel" / "demo" / "teacher"
LENGTH, BATCH, RATE = 128, 16, 3e-3
PROMPT_WEIGHT = 0.1  # prompts are random sentences: there is little to learn from predicting them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.manual_seed(0)
    world = World()
    tokenizer = make_tokenizer(world)
    model = Qwen2ForCausalLM(make_config(len(tokenizer)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.monotonic()
    curve = train(model, batches(world, tokenizer), options.steps)
    minutes = (time.monotonic() - started) / 60
    model.to(torch.bfloat16).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    (options.folder / "scores.json").write_text(json.dumps(measure(options.folder), indent=1) + "\n")
    record = {
        "minutes": round(minutes, 1),
        "machine": "2 CPU cores",
        "tokens": options.steps * LENGTH * BATCH,
        "command": "python scripts/train_demo_teacher.py",
        "curve": curve,
    }
    (options.folder / "training_curve.json").write_text(json.dumps(record, indent=1) + "\n")
    write_sums(options.folder)


def make_config(vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.05,
    )


def batches(world: World, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """Packed rows [B, T]: token ids, positions, and the weight of each token in the loss.

    Positions start at 0 with each example, from which transformers sees that examples must not attend to each other.
    """
    examples = world.examples(seed=1)
    ids: list[int] = []
    positions: list[int] = []
    weights: list[float] = []
    size = LENGTH * BATCH
    while True:
        while len(ids) < size:
            prompt, target = next(examples)
            asked = len(tokenizer.encode(prompt)) if prompt else 0
            tokens = [*tokenizer.encode((prompt + target).lstrip()), tokenizer.eos_token_id]
            ids += tokens
            positions += range(len(tokens))
            weights += [PROMPT_WEIGHT] * asked + [1.0] * (len(tokens) - asked)
        yield {
            name: torch.tensor(values[:size]).view(BATCH, LENGTH)
            for name, values in (("ids", ids), ("positions", positions), ("weights", weights))
        }
        ids, positions, weights = ids[size:], positions[size:], weights[size:]


def train(model: Qwen2ForCausalLM, source: Iterator, steps: int) -> list[dict[str, float]]:
    """AdamW with warm-up and cosine; gives the curve."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    curve, mean, started = [], None, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = next(source)
        ids, positions = batch["ids"], batch["positions"]
        logits = model(ids[:, :-1], position_ids=positions[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = (batch["weights"] * (positions > 0))[:, 1:].flatten()  # an example's first token is not asked for
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = losses.detach()[weight == 1].mean().item()
        mean = answers if mean is None else 0.95 * mean + 0.05 * answers
        if (step + 1) % 500 == 0:
            print({name: round(value, 3) for name, value in by_skill(model).items()}, flush=True)
        if (step + 1) % 50 == 0:
            curve.append({"step": step + 1, "answer_loss": round(mean, 4), "tokens": (step + 1) * LENGTH * BATCH})
            print(
                f"{step + 1} {mean:.4f} {curve[-1]['tokens'] / (time.monotonic() - started):,.0f}/s",
                flush=True,
            )
    return curve


def by_skill(model: Qwen2ForCausalLM, limit: int = 20) -> dict[str, float]:
    """A quick look at each skill while the model trains."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(load_config(prepare_demo(Path(folder))).tasks)
        for task in tasks:
            task.limit = limit
        model.eval()
        evaluation = evaluate(model, make_tokenizer(World()), tasks)
    model.train()
    return {name: score.value for name, score in evaluation.scores.items()}


def measure(folder: Path) -> dict[str, Any]:
    """The stored weights' scores on all 150 items of a skill, and what skipping each single layer costs."""
    model, tokenizer = load_model(folder)
    layers = range(model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as world:
        tasks = make_tasks(load_config(prepare_demo(Path(world))).tasks)
        for task in tasks:
            task.limit = None
        by_branch = score_tasks(Engine(LayerwiseModel(model), tokenizer, layers), tasks)
    whole, *skipped = [Evaluation(scores) for scores in by_branch]
    aggregate = whole.aggregate(whole)
    return {
        "command": "python scripts/train_demo_teacher.py",
        "machine": "2 CPU cores",
        "aggregate": aggregate,
        "scores": evaluation_to_json(whole),
        "cost_of_skipping": {
            str(layer): {"cost": aggregate - e.aggregate(whole), "stderr": whole.difference_stderr(e, whole)}
            for layer, e in zip(layers, skipped, strict=True)
        },
    }


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every file beside it, in the form that sha256sum --check reads."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
