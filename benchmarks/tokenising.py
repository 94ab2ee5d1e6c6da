"""Times text to token ids: read and tokenised anew each time, against tokenised once into files that are kept.

    python benchmarks/tokenising.py --model SMOLLM2 --text ../shared/kit/real/text/general_en.jsonl --out results.json

Four ways, of which the fastest of some times counts, each with a tokenizer that has seen nothing yet:

- anew, one thread: chunk after chunk by one core, as every process did in every round;
- anew, all threads: the same, with the threads that the tokenizer has of its own;
- first: `TokenStore`, which reads and tokenises ahead in threads of its own, writes the files, and reads them;
- again: what a later round, a resume or another process does: it reads the files.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from machine import machine
from measuring import finish
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.data.documents import mix_documents
from layerpeel.data.token_store import TokenStore
from layerpeel.data.tokenizing import start_tokens

THREADS = "TOKENIZERS_PARALLELISM"  # which the tokenizers library reads at each call
CHUNK = 512  # documents of a call
ALL = 2**62  # tokens: all that there are

Way = Callable[[TextConfig, PreTrainedTokenizerBase, Path], Iterator[Tensor]]


def anew(source: TextConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[Tensor]:
    """Reads and tokenises one chunk after another."""
    documents = (str(text) for _, text in mix_documents([source], 0))
    start, end = start_tokens(tokenizer), [tokenizer.eos_token_id]
    while chunk := list(islice(documents, CHUNK)):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield torch.tensor([*start, *ids, *end], dtype=torch.int32)


def kept(source: TextConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[Tensor]:
    """Reads what is kept in a folder, once it is there."""
    return TokenStore(folder).reader([source], tokenizer, 0, ALL)()


def main() -> None:
    """Measures all ways by turns, checks that they give the same, and prints the times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer, or a hub name")
    parser.add_argument("--text", type=Path, default=Path("../shared/kit/real/text/general_en.jsonl"))
    parser.add_argument("--cores", type=int, default=2, help="that the process may use, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)
    source, seconds = TextConfig(path=str(options.text)), dict[str, list[float]]()
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=options.out.parent if options.out else None) as folder:
            ways: list[tuple[str, Way, str]] = [
                ("anew, one thread", anew, "false"),
                ("anew, all threads", anew, "true"),
                ("first", kept, "false"),
                ("again", kept, "false"),
            ]
            results = []
            for name, way, threads in ways:
                os.environ[THREADS] = threads
                tokenizer = AutoTokenizer.from_pretrained(options.model)
                started = time.monotonic()
                results.append(list(way(source, tokenizer, Path(folder))))
                seconds.setdefault(name, []).append(time.monotonic() - started)
            for other in results[1:]:
                assert len(other) == len(results[0]) and all(map(torch.equal, other, results[0]))
            tokens = sum(map(len, results[0]))
    fastest = {name: min(times) for name, times in seconds.items()}
    record = {
        "command": f"python benchmarks/tokenising.py --model {Path(options.model).name} --text {options.text.name}",
        "machine": machine(),
        "cores": len(cores),
        "tokens": tokens,
        "seconds": {name: round(time, 3) for name, time in fastest.items()},
        "tokens_per_second": {name: round(tokens / time) for name, time in fastest.items()},
        "faster": {name: round(fastest["anew, one thread"] / time, 2) for name, time in fastest.items()},
    }
    finish(options.out, record)


if __name__ == "__main__":
    main()
