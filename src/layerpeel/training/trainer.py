"""The training of one round: optimizer, schedule, the step, and what happens when a step goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from layerpeel.config.distill import DistillConfig
from layerpeel.data.batches import cycle_batches
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError, RunError
from layerpeel.losses.loss_sum import LossSum
from layerpeel.processes.distributed import processes_of, sum_numbers
from layerpeel.processes.interrupts import stop_asked, stop_if_asked
from layerpeel.processes.progress import console, progress
from layerpeel.training.forward import FINAL, next_tokens, run_both
from layerpeel.training.parallel import gradient_norm, sharded, sum_gradients
from layerpeel.training.result import NO_LOSS, Log, TrainingResult
from layerpeel.training.state import TrainingState, collect, restore
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache

MOST_RESTARTS = 3  # of a round, each with half the learning rate


class Trainer:
    """Trains some of a student's parameters for a number of steps.

    Args:
        names: of the parameters.
        steps: of the optimizer.
        cache: where teacher states are kept.
        state: where training saves how far it is, and goes on from.
    """

    def __init__(
        self,
        student: Student,
        names: list[str],
        config: DistillConfig,
        steps: int,
        cache: TeacherCache | None,
        state: TrainingState | None,
    ) -> None:
        self.student, self.names, self.config, self.steps = student, names, config, steps
        self.cache, self.state = cache, state
        self.device, dtype = student.model.device, student.model.dtype
        self.autocast = partial(torch.autocast, self.device.type, dtype, enabled=dtype is not torch.float32)
        self.processes = processes_of(self.device)
        self.layers = sorted({layer for n in names if (layer := student.layer_of(n)) is not None})
        self.losses = LossSum(config.losses, balance=config.balance_losses)
        self.wanted = self.losses.hidden_layers(self.layers)

    def train(self, rows: Rows, seed: int, log: Log | None, description: str) -> TrainingResult:
        """Trains for all steps; begins again with half the learning rate where too many steps are not finite."""
        self.student.add_trained(self.names)
        here = self.student.parameters()
        before = {name: here[name].detach().to("cpu", copy=True) for name in self.names}
        parameters = sum(value.numel() for value in before.values())
        saved = self.state.load() if self.state else None
        tensors, numbers = saved or ({}, {"result": {}, "skipped": 0, "running": {}})
        self.result = TrainingResult(**({"layers": self.layers, "parameters": parameters} | numbers["result"]))
        self.skipped, self.losses.running = numbers["skipped"], numbers["running"]
        while not self._attempt(rows, seed, log, description, tensors):
            self.skipped, restarts, rate = self.skipped + self.result.skipped, self.result.restarts, self._rate / 2
            if restarts == MOST_RESTARTS:
                raise RunError(
                    f"training diverged: {self.skipped} steps had a loss or a gradient that is not finite, down to a "
                    f"learning rate of {self._rate:g}",
                    hint="lower distill.learning_rate, or look for NaN in the teacher's weights; finished rounds are "
                    "kept",
                )
            console.print(
                f"{self.result.skipped} steps were not finite: the round starts again, learning rate {rate:g}"
            )
            self.student.load_trained(before)
            self.result, tensors = TrainingResult(self.layers, parameters, restarts=restarts + 1), {}
        self.result.skipped += self.skipped
        return self.result

    @property
    def _rate(self) -> float:
        return float(self.config.learning_rate / 2**self.result.restarts)

    def _attempt(self, rows: Rows, seed: int, log: Log | None, description: str, saved: Mapping[str, Tensor]) -> bool:
        """Trains with a learning rate, adding to `result`; False where too many steps had to be skipped."""
        result, here = self.result, self.student.parameters()
        dtypes = {name: here[name].dtype for name in self.names}
        for name in self.names:
            here[name].data = here[name].data.float()
            if saved:
                here[name].data.copy_(saved[f"parameter {name}"])
            here[name].requires_grad_(True)
        each = self.config.accumulation
        batches = cycle_batches(
            rows,
            self.config.batch_size,
            seed=seed,
            steps=self.steps * each,
            start=result.steps * each,
            rank=self.processes.process_index,
            world=self.processes.num_processes,
        )
        try:
            with sharded(self.student), progress(description, self.steps) as advance:
                self._begin(saved)
                started, seen = time.monotonic(), result.tokens
                advance(result.steps)
                for point in result.curve:
                    if log:
                        log(point)
                while result.steps < self.steps:
                    point = self._step(list(islice(batches, each)))
                    result.steps += 1
                    result.tokens += int(point["tokens"])
                    result.skipped += int(point["skipped"])
                    result.curve.append(point | {"tokens": result.tokens})
                    if log:
                        log(result.curve[-1])
                    advance(note=_note(point, (result.tokens - seen) / (time.monotonic() - started), self.device))
                    if result.skipped > self.config.max_skipped_steps:
                        return False
                    self._save_if_due(time.monotonic() - started)
        finally:
            here = self.student.parameters()
            for name in self.names:
                here[name].requires_grad_(False)
                here[name].grad = None
                here[name].data = here[name].data.to(dtypes[name])
        result.without_gradient = sorted(self.losses.without_gradient)
        if self.cache:
            result.cached = self.cache.hits / max(self.cache.hits + self.cache.misses, 1)
        return True

    def _begin(self, saved: Mapping[str, Tensor]) -> None:
        """Optimizer and schedule, over parameters that may be split by now, new or as they were saved."""
        here = self.student.parameters()
        self.trained: list[nn.Parameter] = [here[name] for name in self.names]
        split = [p for p in self.trained if isinstance(p, DTensor)]
        groups = [split, [p for p in self.trained if not isinstance(p, DTensor)]]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "initial_lr": self._rate} for group in groups if group],
            lr=self._rate,
            weight_decay=self.config.weight_decay,
        )
        warmup, done = min(self.config.warmup_steps, self.steps // 2), self.result.steps - self.result.skipped
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.steps, last_epoch=done - 1)
        restore(self.optimizer, dict(zip(self.names, self.trained, strict=True)), saved)

    def _save_if_due(self, seconds: float) -> None:
        """Saves the state where that is due in a process, and after the last step; stops where a stop was asked for."""
        if not self.state:
            stop_if_asked()
            return
        wanted = sum_numbers({"due": float(self.state.is_due), "stop": float(stop_asked())}, self.device)
        if any(wanted.values()) or self.result.steps == self.steps:
            result = asdict(self.result) | {"seconds": self.result.seconds + seconds}
            tensors = collect(dict(zip(self.names, self.trained, strict=True)), self.optimizer)
            self.state.save(tensors, {"result": result, "skipped": self.skipped, "running": self.losses.running})
        if wanted["stop"]:
            stop_if_asked()

    def _step(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step over this process's micro-batches; skipped in all processes if it is not finite."""
        for batch in batches:
            batch["labels"] = next_tokens(batch)
        counts = sum_numbers(
            {
                "tokens": float(sum(batch["attention_mask"].sum() for batch in batches)),
                "labels": float(sum((batch["labels"] >= 0).sum() for batch in batches)),
            },
            self.device,
        )
        while not (totals := self._accumulate(batches, counts)):
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        totals = sum_numbers(totals, self.device)
        sum_gradients(self.trained)
        norm = gradient_norm(self.trained, self.device)
        finite = math.isfinite(totals["loss"]) and math.isfinite(norm)
        rate = self.schedule.get_last_lr()[0]
        if finite:
            scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            self.optimizer.step()
            self.schedule.step()
            self.losses.remember(totals)
        self.optimizer.zero_grad()
        point = {"learning_rate": rate, "gradient_norm": norm, "tokens": counts["tokens"], "skipped": float(not finite)}
        return totals | point

    def _accumulate(self, batches: list[dict[str, Tensor]], counts: Mapping[str, float]) -> dict[str, float]:
        """The gradients and losses of a step; no losses where memory ran out, and micro-batches are half as large now.

        Losses are shares of the step's, so they add up to the same sum whatever the micro-batches are cut to.
        """
        totals: dict[str, float] = {}
        rows = max(1, self.config.batch_size >> self.result.halved)
        try:
            for batch in batches:
                for start in range(0, len(batch["input_ids"]), rows):
                    part = {name: value[start : start + rows] for name, value in batch.items()}
                    for name, value in self._backward(part, counts).items():
                        totals[name] = totals.get(name, 0.0) + float(value)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            self._halve(rows)
            return {}
        return totals

    def _halve(self, rows: int) -> None:
        """Makes micro-batches half as large.

        Raises:
            RunError: they are of one row, or layers are split between processes, which then are not at the same place.
        """
        if rows == 1 or any(isinstance(parameter, DTensor) for parameter in self.trained):
            raise RunError(
                f"out of memory in training, with {rows} rows of {self.config.sequence_length} tokens at a time",
                hint="lower distill.batch_size (with more distill.accumulation) or distill.sequence_length, or set "
                "distill.activation_checkpointing: true",
            ) from None
        self.result.halved += 1
        console.print(f"out of memory: {max(1, self.config.batch_size >> self.result.halved)} rows at a time from here")

    def _backward(self, batch: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Tensor]:
        """Adds a micro-batch's gradients; gives its share of the losses."""
        wanted = [*self.wanted, FINAL]
        known = self.cache.find(batch, wanted, self.student.model) if self.cache else None
        with self.autocast():
            outputs = run_both(
                self.student,
                batch,
                self.wanted,
                known=known,
                step_tokens=int(counts["tokens"]),
                step_labels=int(counts["labels"]),
                micro_batches=self.config.accumulation * self.processes.num_processes,
                recompute=self.config.activation_checkpointing,
            )
            if self.cache and known is None:
                known = self.cache.keep(batch, {layer: outputs.teacher_hidden[layer] for layer in wanted})
                outputs = replace(outputs, teacher_hidden=known, teacher_final=known[FINAL])
            loss, parts = self.losses(outputs)
        if not loss.requires_grad:
            raise InputError(
                f"distill.losses: none of {', '.join(parts)} depends on what trains, so there is no gradient",
                hint="name another loss, or train what it sees (distill.train)",
            )
        loss.backward()
        return {"loss": loss.detach(), **parts}


def _note(point: Mapping[str, float], speed: float, device: torch.device) -> str:
    """What stands beside the bar: losses, learning rate, speed, memory."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    losses = " ".join(f"{name} {value:.4f}" for name, value in point.items() if name not in NO_LOSS)
    return f"{losses}, lr {point['learning_rate']:.1e}, {speed:,.0f} tokens/s, {memory / 2**30:.1f} GiB"
