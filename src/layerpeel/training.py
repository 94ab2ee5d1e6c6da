"""The training loop of one round: distilling the frozen teacher into the student."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from layerpeel.config import DistillConfig, RunConfig
from layerpeel.data import cycle_batches, load_rows, positions_of
from layerpeel.errors import InputError, RunError
from layerpeel.importance import LayerScores, ScoringInputs
from layerpeel.losses import LossSum, StepOutputs
from layerpeel.progress import console, progress
from layerpeel.student import Student, layers_to_train
from layerpeel.tasks import evaluate


@dataclass
class TrainingResult:
    """What one round of training did.

    Attributes:
        layers: teacher indices of the trained layers.
        steps: optimizer steps.
        tokens: real tokens seen.
        seconds: wall-clock time.
        curve: a dict a step: `loss`, each part without its weight, `learning_rate`, `gradient_norm`, `tokens` so far.
    """

    layers: list[int]
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All but the curve, with the mean loss of the first and of the last tenth of the steps, if there were any."""
        tenth = max(1, self.steps // 10)
        losses = [point["loss"] for point in self.curve]
        ends = {"first_loss": _mean(losses[:tenth]), "last_loss": _mean(losses[-tenth:])} if losses else {}
        return {k: v for k, v in asdict(self).items() if k != "curve"} | ends


def train_student(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillConfig,
    *,
    seed: int = 0,
    storage: torch.dtype = torch.float32,
    description: str = "distilling",
) -> TrainingResult:
    """Trains the layers that `config.train` names, and leaves their weights in the student.

    Trained layers have fp32 weights while they train; afterwards they hold what `storage` can, so that what is
    measured is what will be saved. Dropout stays off.

    Raises:
        InputError: nothing to train, or no text.
        RunError: a loss was not finite.
    """
    tokens_per_step = config.batch_size * config.accumulation * config.sequence_length
    steps = config.tokens_per_round // tokens_per_step if config.tokens_per_round else 0
    if config.tokens_per_round and not steps:
        steps = 1
    if not steps:
        return TrainingResult(layers=[])
    started = time.monotonic()
    chosen = layers_to_train(student, config.train, config.radius)
    packing = config.packing and student.teacher.runs_packed
    if packing != config.packing:
        console.print("distill.packing: this model cannot keep documents of a row apart; one document a row")
    rows = load_rows(
        config.text, tokenizer, sequence_length=config.sequence_length, packing=packing,
        max_tokens=steps * tokens_per_step, seed=seed,
    )  # fmt: skip
    dtype = student.model.dtype
    if dtype is torch.float16:
        raise InputError("dtype: float16 gradients would underflow", hint="train with dtype: bfloat16 or float32")
    student.own(chosen)
    parameters = _start(student, chosen)
    result = TrainingResult(layers=list(chosen))
    try:
        trainer = _Trainer(student, parameters, config, steps, dtype)
        batches = cycle_batches(rows, config.batch_size, seed=seed, steps=steps * config.accumulation)
        with progress(description, steps) as advance:
            for _ in range(steps):
                point = trainer.step([next(batches) for _ in range(config.accumulation)])
                result.tokens += int(point["tokens"])
                result.steps += 1
                result.curve.append(point | {"tokens": result.tokens})
                speed = result.tokens / (time.monotonic() - started)
                advance(note=f"loss {point['loss']:.4f}, {speed:,.0f} tokens/s")
    finally:
        _stop(student, chosen, dtype)
    student.round_owned(storage)
    result.seconds = time.monotonic() - started
    return result


def heal_candidates(student: Student, inputs: ScoringInputs, scores: LayerScores, config: RunConfig) -> None:
    """Removes each of the best few candidates on trial, distils for a few steps, and notes what the tasks lose then."""
    assert config.score.heal and inputs.reference
    started = time.monotonic()
    distill = config.distill
    per_step = distill.batch_size * distill.accumulation * distill.sequence_length
    distill = distill.model_copy(update={"tokens_per_round": config.score.heal.steps * per_step})
    whole = inputs.reference.aggregate(inputs.reference, config.aggregate)
    for layer in scores.ranked()[: config.score.heal.keep]:
        trial = student.branch()
        trial.remove([layer])
        train_student(trial, inputs.tokenizer, distill, seed=config.seed, description=f"healing without layer {layer}")
        evaluation = evaluate(trial.model, inputs.tokenizer, inputs.tasks)
        scores.healed[layer] = whole - evaluation.aggregate(inputs.reference, config.aggregate)
    scores.heal_seconds = time.monotonic() - started


class _Trainer:
    """Optimizer, schedule and the step over them."""

    def __init__(
        self,
        student: Student,
        parameters: list[nn.Parameter],
        config: DistillConfig,
        steps: int,
        dtype: torch.dtype,
    ) -> None:
        device = student.model.device
        # Accelerate fixes its precision once a process; ours may differ from one call to the next.
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
        self.student, self.parameters, self.config = student, parameters, config
        self.last_trained = max(index for index in student.owned if _trains(student.layer(index)))
        self.losses = LossSum(config.losses)
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, min(config.warmup_steps, steps // 2), steps)

    def step(self, batches: list[Mapping[str, Tensor]]) -> dict[str, float]:
        """One optimizer step over its micro-batches."""
        step_tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
        totals: dict[str, float] = {}
        for batch in batches:
            with self.autocast():
                outputs = run_both(self.student, batch, self.last_trained, step_tokens, len(batches))
                loss, parts = self.losses(outputs)
            for name, value in {"loss": loss.detach(), **parts}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            if not math.isfinite(totals["loss"]):
                raise RunError(
                    f"the loss is not finite ({', '.join(f'{k} {v:.3g}' for k, v in totals.items())})",
                    hint="lower distill.learning_rate, or use dtype: bfloat16 or float32",
                )
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return totals | {"learning_rate": rate, "gradient_norm": float(norm or 0.0), "tokens": step_tokens}


def run_both(
    student: Student, batch: Mapping[str, Tensor], last_trained: int, step_tokens: int, micro_batches: int
) -> StepOutputs:
    """Teacher and student on one micro-batch; what they have in common runs once, without a graph.

    Args:
        batch: `input_ids` and `attention_mask`, [B, T], right-padded; `document` where a row holds several.
        last_trained: teacher index of the last trained layer.
    """
    device = student.model.device
    input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()
    shared, teacher = student.shared_prefix, student.teacher
    with torch.no_grad():
        hidden, arguments = teacher.begin(input_ids, positions_of(batch.get("document")))
        for index in range(shared):
            hidden = teacher.layer(index, hidden, arguments[index])
        theirs, teacher_inner = hidden, hidden
        for index in range(shared, len(teacher.layers)):
            theirs = teacher.layer(index, theirs, arguments[index])
            teacher_inner = theirs if index == last_trained else teacher_inner
        teacher_final = teacher.norm(theirs)
    ours, student_inner = hidden, hidden
    for position in range(shared, len(student.depth)):
        index = student.depth.kept[position]
        ours = student.stack.layer(position, ours, arguments[index])
        student_inner = ours if index == last_trained else student_inner
    return StepOutputs(
        student_final=student.stack.norm(ours), teacher_final=teacher_final,
        student_inner=student_inner, teacher_inner=teacher_inner,
        mask=mask, step_tokens=step_tokens, micro_batches=micro_batches, head=teacher,
    )  # fmt: skip


def _start(student: Student, chosen: dict[int, list[str]]) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for index, names in chosen.items():
        layer = student.layer(index).float()
        parameters += [p for name, p in layer.named_parameters() if name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _stop(student: Student, chosen: dict[int, list[str]], dtype: torch.dtype) -> None:
    for index in chosen:
        student.layer(index).requires_grad_(False).to(dtype)


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def distill(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    removed: Iterable[int],
    config: DistillConfig,
    *,
    seed: int = 0,
    storage: torch.dtype | None = None,
) -> tuple[PreTrainedModel, TrainingResult]:
    """Removes layers from a teacher and distils the gap, for one round.

    Args:
        teacher: stays as it is; the student shares all its weights but those that train.
        removed: teacher layers to remove, counted from 0.
        storage: the dtype that the student will be saved in; the teacher's if not given.

    Returns:
        the student, a model of the teacher's class, and what training did.

    Raises:
        InputError: a layer is not there, the config selects nothing to train, or there is no text.
    """
    student = Student(teacher)
    student.remove(removed)
    result = train_student(student, tokenizer, config, seed=seed, storage=storage or teacher.dtype)
    return student.model, result
