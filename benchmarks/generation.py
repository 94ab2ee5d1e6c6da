"""Times generation for all candidates in one decode loop against generating with each shorter model, one by one.

    python benchmarks/generation.py --out results.json

On the kit's storyteller-18 and its copy tasks. One by one is transformers' own `generate` on each shorter model, with
the prompts sorted and batched alike. Checks that the texts are the same for every candidate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from pathlib import Path

import torch
from machine import machine
from measuring import KIT, finish, timed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.run import TaskConfig
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.registry import make_tasks

TASKS = ("copy_en", "copy_ru")


def main() -> None:
    """Times both, and writes the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, of which the median counts")
    parser.add_argument("--limit", type=int, default=60, help="samples of each task")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts that go together one by one")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, tokenizer = load_model(KIT / "models" / "storyteller-18")
    candidates = list(range(1, model.config.num_hidden_layers - 1))
    tasks = make_tasks(
        [
            TaskConfig(
                kind="generate", name=name, data=str(KIT / "eval/stories" / f"{name}.jsonl"), limit=options.limit
            )
            for name in TASKS
        ]
    )
    by_task = [[r for r in task.requests(tokenizer) if isinstance(r, Generation)] for task in tasks]

    def at_once() -> list[list[str]]:
        answers = [Engine(LayerwiseModel(model), tokenizer, candidates).answer(requests) for requests in by_task]
        return [[str(text) for texts in branch for text in texts] for branch in zip(*answers, strict=True)]

    def alone() -> list[list[str]]:
        models = [remove_layers(copy.deepcopy(model), [] if c is None else [c]) for c in (None, *candidates)]
        return [
            [text for requests in by_task for text in generate(each, tokenizer, requests, options.batch_size)]
            for each in models
        ]

    times: dict[str, list[float]] = {"at_once": [], "one_by_one": []}
    for _ in range(options.repeats):
        texts, expected = timed(times["at_once"], at_once), timed(times["one_by_one"], alone)
        print({name: round(values[-1], 1) for name, values in times.items()}, flush=True)
    middle = {name: statistics.median(values) for name, values in times.items()}
    pairs = [pair for both in zip(texts, expected, strict=True) for pair in zip(*both, strict=True)]
    different = sum(text != other for text, other in pairs)
    record = {
        "command": f"python benchmarks/generation.py --limit {options.limit} --batch-size {options.batch_size}",
        "machine": machine(),
        "seconds": middle,
        "all_seconds": times,
        "ratio": middle["one_by_one"] / middle["at_once"],
        "texts": len(pairs),
        "different_texts": different,
    }
    finish(options.out, record)


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[Generation], batch_size: int
) -> list[str]:
    """Greedy texts by the model's own `generate`, in left-padded batches of prompts of like length."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
    texts = [""] * len(requests)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [list(requests[index].prompt) for index in batch]
        width, first = max(map(len, prompts)), requests[batch[0]]
        output = model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            do_sample=False,
            max_new_tokens=first.max_new_tokens,
            stop_strings=list(first.stop),
            tokenizer=tokenizer,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for index, new in zip(batch, output[:, width:].tolist(), strict=True):
            new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
            texts[index] = tokenizer.decode(new, skip_special_tokens=True)
            for stop in first.stop:
                texts[index] = texts[index].split(stop, 1)[0]
    return texts


if __name__ == "__main__":
    main()
