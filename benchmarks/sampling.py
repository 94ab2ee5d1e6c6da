"""Times the text that a teacher writes (`from: teacher`), and says what it is like.

    python benchmarks/sampling.py --model ../shared/kit/models/storyteller-18 --tokens 50000
    python benchmarks/sampling.py --model MODEL --dtype bfloat16 --tokens 20000 --out results.json

Also times a forward pass over the same text, layer by layer, which is the least that its training will take of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import machine

from layerpeel.config.fields import TeacherTextConfig
from layerpeel.data.token_documents import read_token_documents
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.teacher_text import TeacherWriter
from layerpeel.model.loading import load_model


def main() -> None:
    """Writes a text, reads it once, and prints the speeds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document, at most")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        writer = TeacherWriter(
            model, tokenizer, Path(folder), teacher=None, length=options.length, tokens=options.tokens
        )
        writer.resolve([TeacherTextConfig(tokens=options.tokens)])
        (written,) = writer.written.values()
        forward = _forward(writer.layerwise, torch.cat(list(read_token_documents(written.folder))), options.length)
    result: dict[str, Any] = {
        "machine": machine(),
        "model": Path(options.model).name,
        "dtype": str(model.dtype),
        "tokens": written.text.tokens,
        "documents": written.text.documents,
        "tokens_per_second": round(written.tokens_per_second, 1),
        "forward_tokens_per_second": round(forward, 1),
        **asdict(written.signs()),
        "samples": written.samples(),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


@torch.no_grad()
def _forward(layerwise: LayerwiseModel, tokens: torch.Tensor, length: int) -> float:
    """Tokens a second of the model's own forward, in batches of 8 rows."""
    batches = tokens[: len(tokens) // (8 * length) * 8 * length].long().view(-1, 8, length)[:8]
    started = time.monotonic()
    for batch in batches:
        layerwise.model(batch.to(layerwise.device), use_cache=False, logits_to_keep=1)
    return batches.numel() / (time.monotonic() - started)


if __name__ == "__main__":
    main()
