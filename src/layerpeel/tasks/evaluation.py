"""Scores of a model, and of each candidate, on all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import InputError, RunError
from layerpeel.inference.engine import Engine
from layerpeel.inference.finite import NotFiniteError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Answer, Generation, is_cut
from layerpeel.processes.progress import print_once
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.scores import Evaluation, TaskScore


def evaluate(
    model: PreTrainedModel | LayerwiseModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> Evaluation:
    """Scores a model on tasks.

    Args:
        model: a causal language model, or one that is run layer by layer already.
        tokenizer: its tokenizer.
        tasks: what `make_tasks` gives.

    Raises:
        InputError: a task generates text, and the model's layers are read from the disk.
    """
    layerwise = model if isinstance(model, LayerwiseModel) else LayerwiseModel(model)
    if layerwise.streamed:
        refuse_generation(tasks, tokenizer)
    return Evaluation(score_tasks(Engine(layerwise, tokenizer), tasks)[0])


def refuse_generation(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses tasks that a model cannot be asked whose layers are read from the disk.

    Raises:
        InputError: one generates text.
    """
    for task in tasks:
        if any(isinstance(request, Generation) for request in task.requests(tokenizer)):
            raise InputError(
                f"task {task.name} generates text, for which every layer would be read from disk for every token",
                hint="keep the weights in memory (weights: memory), or leave it out; log-likelihood tasks can be "
                "streamed",
            )


def score_tasks(engine: Engine, tasks: Sequence[Task]) -> list[dict[str, TaskScore]]:
    """Scores each task on each branch.

    Returns:
        1 + C dicts from task name to score.
    """
    by_branch: list[dict[str, TaskScore]] = [{} for _ in range(engine.branches)]
    for task in tasks:
        samples = task.samples(engine.tokenizer)
        for scores, answers in zip(by_branch, answer_samples(engine, samples, task.name), strict=True):
            scores[task.name] = score_samples(task, samples, answers, engine)
    return by_branch


def score_samples(
    task: Task, samples: Sequence[Sample], answers: Sequence[Sequence[Answer]], engine: Engine
) -> TaskScore:
    """The score of some of a task's samples, with how many of them were cut to the model's context."""
    return replace(task.score(samples, answers), cut=len(_cut_samples(engine, samples)))


def answer_samples(engine: Engine, samples: Sequence[Sample], description: str) -> list[list[list[Answer]]]:
    """The answers to each sample's requests on each branch, [1 + C][samples][requests of the sample].

    Args:
        description: the task's name.

    Raises:
        InputError: a target is longer than the model's context.
        RunError: the model gives NaN or infinity, or memory does not suffice for a single row.
    """
    _check_targets(engine, samples, description)
    owners = [sample for sample in samples for _ in sample.requests]
    by_branch = []
    try:
        answered = engine.answer([request for sample in samples for request in sample.requests], description)
    except NotFiniteError as error:
        place = "" if error.request is None else owners[error.request].place
        raise RunError(f"task {description}: {f'{place}: ' if place else ''}{error}", hint=error.hint) from None
    for answers in answered:
        rest = iter(answers)
        by_branch.append([[next(rest) for _ in sample.requests] for sample in samples])
    return by_branch


def _check_targets(engine: Engine, samples: Sequence[Sample], name: str) -> None:
    """Refuses samples that cannot be answered rightly, and says how many are cut or of unknown tokens."""
    for sample in samples:
        for request in sample.requests:
            if isinstance(request, Generation) and (request.needed or 0) >= engine.window:
                raise InputError(
                    f"task {name}: {f'{sample.place}: ' if sample.place else ''}its target takes {request.needed} "
                    f"tokens, and the model reads {engine.window} at a time",
                    hint="leave such rows out, shorten their targets, or set max_new_tokens",
                )
    if cut := _cut_samples(engine, samples):
        print_once(
            f"task {name}: {len(cut)} of {len(samples)} prompts are longer than the model's context of "
            f"{engine.window} tokens and are cut at their beginning{_first(cut)}"
        )
    if unknown := [sample for sample in samples if _is_unknown(sample, engine.tokenizer)]:
        print_once(
            f"task {name}: {len(unknown)} of {len(samples)} rows hold a text that the tokenizer does not know: "
            f"at least half of its tokens are unknown ones{_first(unknown)}"
        )


def _first(samples: Sequence[Sample]) -> str:
    return f" ({samples[0].place} is the first)" if samples[0].place else ""


def _is_unknown(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether half of a prompt's or a continuation's tokens, or more, say only that the tokenizer has no other."""
    unknown = tokenizer.unk_token_id
    texts = [r.prompt if isinstance(r, Generation) else r.continuation for r in sample.requests]
    return unknown is not None and any(text and 2 * text.count(unknown) >= len(text) for text in texts)


def _cut_samples(engine: Engine, samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if any(is_cut(request, engine.window) for request in sample.requests)]
