"""Times a student beside its teacher in a runtime: tokens a second of a prompt, and of what is generated after it.

A machine's speed drifts, so the two take turns, and the medians count; only one of them is in memory at a time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layerpeel.errors import RunError, reason_of
from layerpeel.export.verify.answers import Question
from layerpeel.export.verify.llama_cpp import serving
from layerpeel.export.verify.server import Refused, request_json
from layerpeel.export.verify.worker import exchanged
from layerpeel.processes.progress import progress
from layerpeel.report.runtimes import Rates, RuntimeSpeed

PROMPT, NEW = 256, 64  # tokens
TURNS = {"gguf": 5, "vllm": 3}  # vLLM takes long to start


@dataclass(frozen=True)
class Load:
    """What is timed: token ids that are read, and the number of tokens that are generated after them."""

    prompt: list[int]
    new_tokens: int = NEW

    @classmethod
    def of(cls, question: Question) -> Load:
        """The beginning of a text, not more than half of it: what is generated has to fit into the context, too."""
        width = max(1, min(PROMPT, len(question.token_ids) // 2))
        return cls(question.token_ids[:width], min(NEW, width + 1))


@dataclass(frozen=True)
class Rate:
    """Tokens a second in one turn."""

    prompt: float
    generation: float


def time_beside(measure: Callable[[Path], Rate], teacher: Path, student: Path, load: Load, turns: int) -> RuntimeSpeed:
    """Times both in turns.

    Args:
        measure: one file or folder, once.
    """
    pairs = []
    with progress(f"timing {student.name} beside its teacher", 2 * turns) as advance:
        for _ in range(turns):
            rates = []
            for path in (teacher, student):
                rates.append(measure(path))
                advance()
            pairs.append((rates[0], rates[1]))

    def medians(values: list[tuple[float, float]]) -> Rates:
        ratio = statistics.median(student / teacher for teacher, student in values)
        return Rates(
            statistics.median(each for each, _ in values), statistics.median(each for _, each in values), ratio
        )

    return RuntimeSpeed(
        prompt_tokens=len(load.prompt),
        new_tokens=load.new_tokens,
        turns=turns,
        prompt=medians([(teacher.prompt, student.prompt) for teacher, student in pairs]),
        generation=medians([(teacher.generation, student.generation) for teacher, student in pairs]),
    )


def time_gguf(file: Path, load: Load, llama_cpp: Path | None = None, python: str = sys.executable) -> Rate:
    """Times a GGUF file once, by llama.cpp's server, which says how long it took.

    Raises:
        RunError: llama.cpp cannot run it, or does not say.
    """
    body = {"prompt": load.prompt, "n_predict": load.new_tokens, "ignore_eos": True, "temperature": 0.0}
    body |= {"cache_prompt": False, "samplers": ["temperature"]}
    with serving(file, len(load.prompt) + load.new_tokens + 8, llama_cpp, python) as (address, name):
        try:
            request_json(f"{address}/completion", body | {"n_predict": 2})  # it warms up
            timings = request_json(f"{address}/completion", body)["timings"]
            # The first token comes out of reading the prompt, before the time of generation begins.
            generated, seconds = timings["predicted_n"] - 1, timings["predicted_ms"] / 1000
            return Rate(1000 * timings["prompt_n"] / timings["prompt_ms"], generated / seconds)
        except (Refused, KeyError, TypeError, ZeroDivisionError) as error:
            raise RunError(f"{name} says no time for {file.name} ({reason_of(error)})") from None


def time_vllm(
    folder: Path, load: Load, python: str, dtype: str | None = None, *, trust_remote_code: bool = False
) -> Rate:
    """Times a checkpoint once in the vLLM of another Python.

    Raises:
        InputError: it has none.
        RunError: it cannot run it.
    """
    request = {"timed": True, "token_ids": load.prompt, "new_tokens": load.new_tokens + 1}
    request |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with exchanged("vllm", folder, request, python) as (_, timed):
        return Rate(timed["prompt"], timed["generation"])
