"""Runs a model in this Python, whichever that is, and writes what it answers.

    python exchange.py with_transformers FOLDER

FOLDER/request.json says which model, which text and which token ids; FOLDER gets answers.json, top_ids.npy and
top_log_probs.npy. The first argument is a module beside this file with a class `Runtime`:

    Runtime(request)            loads request["model"]
    version, precision, facts   what ran, in which dtype, and what its config says
    token_ids(text)             the text by its own tokenizer
    logits(ids)                 [T, V] in float32; or, of a runtime that does not give them, both of
    top(ids, count)             [T, K] token ids and [T, K] log-probabilities of each next token
    greedy(ids, count)          the most likely continuation

With "timed" in the request, only the seconds are asked that a prompt and so many new tokens take, again and again:

    seconds(ids, count)         of reading the ids and generating exactly so many tokens
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 64  # positions whose logits are sorted at a time
REPEATS = 3  # of which the fastest counts


def top_of(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The most likely tokens at each position, with their log-probabilities: [P, V] -> [P, K] each."""
    count = min(count, logits.shape[1])
    ids, log_probs = [], []
    for start in range(0, len(logits), CHUNK):
        chunk = logits[start : start + CHUNK].astype(np.float64)
        best = np.argpartition(-chunk, count - 1, axis=1)[:, :count]
        largest = chunk.max(1, keepdims=True)
        total = largest + np.log(np.exp(chunk - largest).sum(1, keepdims=True))
        ids.append(best)
        log_probs.append(np.take_along_axis(chunk, best, 1) - total)
    return np.concatenate(ids).astype(np.int64), np.concatenate(log_probs).astype(np.float32)


def greedy(runtime: Any, ids: list[int], count: int) -> list[int]:
    """The most likely continuation, of a runtime that gives logits; the text is read anew for each token."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(runtime.logits(ids + new)[-1].argmax()))
    return new


def answer(runtime: Any, request: dict[str, Any], folder: Path) -> None:
    """Writes the answers of a runtime to a folder."""
    ids, positions = request["token_ids"], request["positions"]
    prompt, new_tokens = request["prompt"], request["new_tokens"]
    if hasattr(runtime, "top"):
        top_ids, log_probs = (array[positions] for array in runtime.top(ids, request["most_likely"]))
        written_on = runtime.greedy(prompt, new_tokens)
    else:
        top_ids, log_probs = top_of(runtime.logits(ids)[positions], request["most_likely"])
        written_on = greedy(runtime, prompt, new_tokens)
    np.save(folder / "top_ids.npy", top_ids)
    np.save(folder / "top_log_probs.npy", log_probs)
    written = {
        "runtime": runtime.version,
        "precision": runtime.precision,
        "token_ids": [int(token) for token in runtime.token_ids(request["text"])],
        "greedy": [int(token) for token in written_on],
        "facts": runtime.facts,
    }
    (folder / "answers.json").write_text(json.dumps(written), encoding="utf-8")


def time(runtime: Any, request: dict[str, Any], folder: Path) -> None:
    """Writes the tokens a second of reading a prompt, and of what is generated after the first token."""
    ids, count = request["token_ids"], request["new_tokens"]
    runtime.seconds(ids, 2)  # it warms up
    first, last = (min(runtime.seconds(ids, each) for _ in range(REPEATS)) for each in (1, count))
    rates = {"prompt": len(ids) / first, "generation": (count - 1) / max(last - first, 1e-6)}
    (folder / "answers.json").write_text(json.dumps({"runtime": runtime.version} | rates), encoding="utf-8")


if __name__ == "__main__":
    chosen, place = sys.argv[1], Path(sys.argv[2])
    asked = json.loads((place / "request.json").read_text(encoding="utf-8"))
    work = time if asked.get("timed") else answer
    work(importlib.import_module(chosen).Runtime(asked), asked, place)
