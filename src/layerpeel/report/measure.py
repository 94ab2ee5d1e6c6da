"""Measures speed, memory and sampled text of a run's students, each rebuilt from the teacher and the run's files."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import RunConfig
from layerpeel.data.tokenizing import read_tokens
from layerpeel.errors import InputError, LayerpeelError
from layerpeel.inference.decoding import plain_generation
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation, Request
from layerpeel.model.config_fields import context_length, text_config
from layerpeel.model.devices import synchronize
from layerpeel.processes.progress import console, plain, progress, shown
from layerpeel.report.measurements import (
    DepthSpeed,
    Measurements,
    MeasureSetup,
    NotMeasured,
    Sample,
    measurements_path,
    read_measurements,
    write_measurements,
)
from layerpeel.run.folder import Run
from layerpeel.run.machine import describe_machine
from layerpeel.run.places import load_run_teacher
from layerpeel.tasks.generate import Generate
from layerpeel.tasks.registry import make_tasks

PROMPT, NEW, BATCH = 64, 32, 8  # tokens, tokens, rows
REPEATS = 5
TURN_SECONDS = 0.2  # spent at least on each measurement of a repeat
SAMPLES, SAMPLE_TOKENS = 4, 64


def measurements(run: Run, *, measure: bool = True) -> Measurements | NotMeasured | None:
    """The measurements of a run's students.

    Args:
        measure: measure now, if that was not done before.

    Returns:
        None if they were not measured before, and not now either.
    """
    path = measurements_path(run.folder)
    before = read_measurements(path)
    if before and len(before.depths) == len(run.rounds) + 1:
        return before
    if not measure or not run.teacher:
        return None
    try:
        measured = measure_run(run)
    except (LayerpeelError, OSError, RuntimeError) as error:  # such as a GPU's memory; the run itself is not affected
        console.print(f"nothing measured: {shown(error)}", style="yellow")
        hint = getattr(error, "hint", None)
        return NotMeasured(f"{error}; {hint}" if hint else str(error))
    try:
        write_measurements(path, measured)
    except OSError as error:  # another's run, whose report is written somewhere else
        console.print(f"the measurements are in the report alone: {shown(error)}", style="yellow", soft_wrap=True)
    return measured


def measure_run(run: Run) -> Measurements:
    """Measures the teacher and every round's student.

    A machine's speed drifts, so the students take turns, `REPEATS` times, and the medians are kept.

    Raises:
        InputError: the teacher is gone, or its layers are not to be in memory.
        RunError: a round's files are gone or damaged.
    """
    if run.config.streams:
        raise InputError(
            "the run read its layers from the disk (weights: stream), and to generate would read all for every token"
        )
    teacher, tokenizer = load_run_teacher(run)
    rounds = range(len(run.rounds) + 1)
    prompts = sample_prompts(run.config, tokenizer, run.kept_texts)
    times: dict[int, list[tuple[float, float]]] = {number: [] for number in rounds}
    peaks: dict[int, int] = {}
    texts: dict[int, list[str]] = {}
    with progress("measuring", REPEATS * len(rounds)) as advance:
        for repeat in range(REPEATS):
            for number in rounds:
                model = run.student_of(teacher, number).model
                if not repeat:  # it warms up, too
                    peaks[number] = peak_memory(model)
                    texts[number] = _answers(model, tokenizer, prompts)
                _generate(model, 1, 2)
                times[number].append((_seconds(model, 1), _seconds(model, BATCH)))
                advance(note=f"{len(run.rounds) - number} layers")
    dtype = str(teacher.dtype).removeprefix("torch.")
    return Measurements(
        setup=MeasureSetup(PROMPT, NEW, BATCH, REPEATS, str(teacher.device), dtype),
        machine=describe_machine(),
        depths={number: _speed(times[number], peaks[number]) for number in rounds},
        samples=[
            Sample(
                source=source,
                prompt=tokenizer.decode(request.prompt, skip_special_tokens=True),
                texts={number: texts[number][index] for number in rounds},
            )
            for index, (source, request) in enumerate(prompts)
        ],
    )


def _speed(times: Sequence[tuple[float, float]], peak: int) -> DepthSpeed:
    """Of seconds at batch 1 and at `BATCH`, one pair a repeat."""
    single = sorted(1000 * seconds / NEW for seconds, _ in times)
    batched = statistics.median(seconds for _, seconds in times)
    return DepthSpeed(
        ms_per_token=statistics.median(single),
        ms_per_token_least=single[0],
        ms_per_token_most=single[-1],
        tokens_per_second=BATCH * NEW / batched,
        peak_memory=peak,
    )


def _seconds(model: PreTrainedModel, rows: int) -> float:
    """Of one generation: the fastest of as many as fit into `TURN_SECONDS`."""
    best, total = float("inf"), 0.0
    while total <= TURN_SECONDS:
        synchronize(model.device)
        started = time.perf_counter()
        _generate(model, rows, NEW)
        synchronize(model.device)
        seconds = time.perf_counter() - started
        best, total = min(best, seconds), total + seconds
    return best


@torch.no_grad()
def _generate(model: PreTrainedModel, rows: int, new: int) -> None:
    """Generates exactly `new` tokens greedily after a prompt of `PROMPT` tokens (fewer, where the context is short)."""
    context = context_length(model.config) or PROMPT + NEW
    width = max(1, min(PROMPT, context - NEW))
    ids = torch.arange(rows * width, device=model.device).view(rows, width) % text_config(model.config).vocab_size
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    with plain_generation(model):
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def peak_memory(model: PreTrainedModel) -> int:
    """Bytes to generate at batch 1: the weights, and the most that was allocated on top of them.

    Weights that the student shares with the teacher count in full, as if it were loaded by itself.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if model.device.type == "cuda":
        synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _generate(model, 1, NEW)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's messages off stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _generate(model, 1, NEW)
    return weights + most_allocated(profile)


def most_allocated(profile: torch.profiler.profile) -> int:
    """The most bytes that were allocated at once under a profiler, from its trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


def sample_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, kept_texts: Sequence[TextConfig] = ()
) -> list[tuple[str, Generation]]:
    """A few prompts of the run's generation tasks, else beginnings of its text, each with its source.

    Args:
        kept_texts: text that the teacher wrote, which is read where there is no other.
    """
    prompts: list[tuple[str, Request]] = []
    for task in (task for task in make_tasks(config.tasks) if isinstance(task, Generate)):
        try:
            prompts += [(task.name, request) for request in task.requests(tokenizer)[:2]]
        except (LayerpeelError, OSError):  # its data are gone
            continue
    if prompts:
        alternating = prompts[::2] + prompts[1::2]  # one of each task before a second one
        return [(name, _cut(request)) for name, request in alternating[:SAMPLES]]
    sources = config.distill.text or config.score.text or []
    text = [source for source in sources if isinstance(source, TextConfig)] or kept_texts
    try:
        documents = list(islice(read_tokens(text, tokenizer, config.seed), 2))
    except (LayerpeelError, OSError):
        return []
    return [("text", Generation(tuple(ids[:24].tolist()), SAMPLE_TOKENS, ())) for ids in documents if len(ids)]


def _cut(request: Request) -> Generation:
    """The request with at most `SAMPLE_TOKENS` new tokens."""
    assert isinstance(request, Generation)
    return Generation(request.prompt, min(request.max_new_tokens, SAMPLE_TOKENS), request.stop)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, Generation]]
) -> list[str]:
    """The model's greedy continuation of each prompt."""
    engine = Engine(LayerwiseModel(model), tokenizer, share_work=False)  # the main process reports alone
    return [plain(engine.answer([request], "samples")[0][0]) for _, request in prompts]
