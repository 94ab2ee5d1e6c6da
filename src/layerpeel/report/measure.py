"""Speed, memory and samples of a run's students, measured by rebuilding each from the teacher and the run."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.data.batches import load_rows
from layerpeel.errors import LayerpeelError
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation, Request
from layerpeel.model.loading import load_teacher
from layerpeel.processes.progress import console, plain, progress, shown
from layerpeel.run.folder import Run, describe_machine
from layerpeel.storage.files import write_whole
from layerpeel.tasks.generate import Generate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.student import Student

PROMPT, NEW, BATCH = 64, 32, 8  # tokens, tokens, rows
REPEATS = 5
TURN_SECONDS = 0.2
SAMPLES, SAMPLE_TOKENS = 4, 64


def measurements(run: Run, *, measure: bool = True) -> dict[str, Any] | None:
    """What was measured of a run's depths; measured now, if it was not before and may be.

    Returns:
        `depths` (by round: `ms_per_token`, `tokens_per_second`, `peak_memory` in bytes), `samples`, `machine`, `setup`;
        or `problem`, where the students cannot be rebuilt; None if nothing is known.
    """
    path = run.folder / "report" / "measurements.json"
    known = _read(path)
    if known and len(known["depths"]) == len(run.rounds) + 1:
        return known
    if not measure or not run.teacher:
        return None
    try:
        found = measure_run(run)
    except (LayerpeelError, OSError, RuntimeError) as error:  # such as a GPU's memory: the run itself stands
        console.print(f"nothing measured: {shown(error)}", style="yellow")
        return {"problem": str(error)}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(found, ensure_ascii=False, indent=1))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["depths"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rebuild(run: Run, teacher: PreTrainedModel, number: int) -> Student:
    """The student as a round left it; that of round 0 is the teacher.

    Raises:
        RunError: the round's files are gone or damaged.
    """
    student = Student(teacher)
    run.restore(student, number)
    return student


def measure_run(run: Run) -> dict[str, Any]:
    """Measures the teacher and every round's student.

    Machines are noisy, and drift: all depths are measured in turn, several times over, and the medians are kept.

    Raises:
        InputError: there is no teacher any more.
        RunError: a round's files are gone or damaged.
    """
    teacher, tokenizer = load_teacher(run.config)
    numbers = range(len(run.rounds) + 1)
    prompts = sample_prompts(run.config, tokenizer)
    times: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    peaks, texts = {}, {}
    with progress("measuring", REPEATS * len(numbers)) as advance:
        for repeat in range(REPEATS):
            for number in numbers:
                model = rebuild(run, teacher, number).model
                if not repeat:  # it warms up, too
                    peaks[number] = peak_memory(model)
                    texts[number] = _answers(model, tokenizer, prompts)
                _generate(model, 1, 2)
                times[number].append((_seconds(model, 1), _seconds(model, BATCH)))
                advance(note=f"{len(run.rounds) - number} layers")
    return {
        "setup": {
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "batch": BATCH,
            "repeats": REPEATS,
            "device": str(teacher.device),
            "dtype": str(teacher.dtype).removeprefix("torch."),
        },
        "machine": describe_machine(),
        "depths": {str(number): _medians(times[number]) | {"peak_memory": peaks[number]} for number in numbers},
        "samples": [
            {
                "source": source,
                "prompt": tokenizer.decode(request.prompt, skip_special_tokens=True),
                "texts": {str(number): texts[number][index] for number in numbers},
            }
            for index, (source, request) in enumerate(prompts)
        ],
    }


def _medians(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    alone = sorted(1000 * one / NEW for one, _ in times)
    together = statistics.median(many for _, many in times)
    return {
        "ms_per_token": statistics.median(alone),
        "ms_per_token_least": alone[0],
        "ms_per_token_most": alone[-1],
        "tokens_per_second": BATCH * NEW / together,
    }


def _seconds(model: PreTrainedModel, rows: int) -> float:
    """Of one generation; of the best of several, where they are so short that another process could spoil them."""
    best, spent = float("inf"), 0.0
    while spent <= TURN_SECONDS:
        _wait(model)
        started = time.perf_counter()
        _generate(model, rows, NEW)
        _wait(model)
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
    return best


@torch.no_grad()
def _generate(model: PreTrainedModel, rows: int, new: int) -> None:
    """Greedy text of exactly `new` tokens after a prompt of `PROMPT` (fewer, where the context is short)."""
    context = getattr(model.config, "max_position_embeddings", None) or PROMPT + NEW
    width = max(1, min(PROMPT, context - NEW))
    ids = torch.arange(rows * width, device=model.device).view(rows, width) % model.config.vocab_size
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def peak_memory(model: PreTrainedModel) -> int:
    """Bytes that a model of its own needs to generate at batch 1: its weights, and the most that came on top of them.

    What teacher and student share counts here as if the student were alone.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.device.type == "cuda":
        _wait(model)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _generate(model, 1, NEW)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _generate(model, 1, NEW)
    return weights + most_allocated(profile)


def most_allocated(profile: torch.profiler.profile) -> int:
    """The most bytes that were allocated at once under a profiler, from the events in its trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = most = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        now += change
        most = max(most, now)
    return most


def sample_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Generation]]:
    """A few prompts with where they are from: those of the run's generation tasks, else beginnings of its text."""
    asked = []
    for task in (task for task in make_tasks(config.tasks) if isinstance(task, Generate)):
        try:
            asked += [(task.name, request) for request in task.requests(tokenizer)[:2]]
        except (LayerpeelError, OSError):  # its data are gone since
            continue
    if asked:
        spread = asked[::2] + asked[1::2]  # one of each task before a second one
        return [(name, _cut(request)) for name, request in spread[:SAMPLES]]
    text = config.distill.text or config.score.text or []
    try:
        rows = load_rows(text, tokenizer, sequence_length=24, packing=False, max_tokens=2 * 24, seed=config.seed)
    except (LayerpeelError, OSError):
        return []
    begun = [tuple(ids[mask].tolist()) for ids, mask in zip(rows.input_ids, rows.mask, strict=True)]
    return [("text", Generation(ids, SAMPLE_TOKENS, ())) for ids in begun if ids]


def _cut(request: Request) -> Generation:
    assert isinstance(request, Generation)
    return Generation(request.prompt, min(request.max_new_tokens, SAMPLE_TOKENS), request.stop)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, Generation]]
) -> list[str]:
    engine = Engine(LayerwiseModel(model), tokenizer)
    return [plain(engine.answer([request], "samples")[0][0]) for _, request in prompts]
