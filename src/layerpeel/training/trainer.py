"""The training of one round: its steps, steps that are not finite, restarts, and going on from a saved state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerpeel.data.batches import micro_batches, step_rows
from layerpeel.data.rows import Rows
from layerpeel.errors import RunError
from layerpeel.losses.loss_sum import LossSum
from layerpeel.processes.distributed import processes_of, sum_numbers
from layerpeel.processes.interrupts import stop_asked, stop_if_any_asked
from layerpeel.processes.malloc import release_unused
from layerpeel.processes.progress import console, progress
from layerpeel.training.averaging import WeightAverage
from layerpeel.training.gradients import StepGradients
from layerpeel.training.optimizer_state import collect, place_as, restore
from layerpeel.training.optimizers import ScheduledOptimizers
from layerpeel.training.parallel import gradient_norm, sum_gradients
from layerpeel.training.recipe import MASTER_DTYPE, TrainingRecipe
from layerpeel.training.result import NO_LOSS, Log, TrainingResult
from layerpeel.training.sharded import sharded, splits_layers
from layerpeel.training.state import Checkpoint, TrainingState
from layerpeel.training.state_files import SavedTensor
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache

MOST_RESTARTS = 3  # of a round, each with half the learning rate


@dataclass
class Attempt:
    """A try at a round with one learning rate, as far as it is.

    Attributes:
        result: of this attempt so far.
        skipped: steps that attempts before it skipped.
        checkpoint: what it goes on from; None at the beginning, and once that is read.
    """

    result: TrainingResult
    skipped: int = 0
    checkpoint: Checkpoint[SavedTensor] | None = None


class Trainer:
    """Trains some of a student's parameters for a round.

    Args:
        names: of the parameters.
        recipe: how.
        cache: where teacher states are kept.
        state: where training saves how far it is, and goes on from.
        log: called with each step's point of the curve, and first with those of the steps that were done before.
        description: stands beside the bar.
    """

    def __init__(
        self,
        student: Student,
        names: list[str],
        recipe: TrainingRecipe,
        *,
        cache: TeacherCache | None = None,
        state: TrainingState | None = None,
        log: Log | None = None,
        description: str = "distilling",
    ) -> None:
        self.student, self.names, self.recipe, self.cache, self.state = student, names, recipe, cache, state
        self.log, self.description = log, description
        self.config, self.steps, self.device = recipe.config, recipe.steps(), student.model.device
        self.layers = sorted({layer for name in names if (layer := student.layer_of(name)) is not None})
        self.losses = LossSum(self.config.losses, balance=self.config.balance_losses)
        self.gradients = StepGradients(student, recipe, self.losses, self.layers, cache)

    def train(self, rows: Rows, seed: int) -> TrainingResult:
        """Trains for all steps; begins again with half the learning rate where too many steps are not finite.

        Args:
            rows: the text.
            seed: of their order.

        Raises:
            RunError: too many steps were not finite, down to the last learning rate; or memory does not suffice.
            Interrupted: a stop was asked for; the state is saved.
        """
        self.student.add_trained(self.names)
        parameters = self._parameters()
        weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        size = sum(value.numel() for value in weights.values())
        attempt = self._resumed() or Attempt(TrainingResult(self.layers, size))
        while not self._complete(attempt, rows, seed, weights):
            attempt = self._restarted(attempt)
            self.student.load_trained(weights)
        if splits_layers():
            release_unused()  # their stand-ins refer to themselves in circles
        result = attempt.result
        result.skipped += attempt.skipped
        result.without_gradient = sorted(self.losses.without_gradient)
        if self.cache:
            result.cached = self.cache.hits / max(self.cache.hits + self.cache.misses, 1)
        return result

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Those that train, by name; under FSDP2, in its context, others than outside of it."""
        parameters = self.student.parameters()
        return {name: parameters[name] for name in self.names}

    def _rate(self, result: TrainingResult) -> float:
        """The peak learning rate of an attempt."""
        return float(self.config.learning_rate / 2**result.restarts)

    def _resumed(self) -> Attempt | None:
        """The attempt that was saved, if one was."""
        if not self.state or not (checkpoint := self.state.load()):
            return None
        self.losses.running = dict(checkpoint.running)
        return Attempt(checkpoint.result, checkpoint.skipped, checkpoint)

    def _restarted(self, attempt: Attempt) -> Attempt:
        """The next attempt after one that failed, with half its learning rate.

        Raises:
            RunError: it was the last.
        """
        result, skipped = attempt.result, attempt.skipped + attempt.result.skipped
        if result.restarts == MOST_RESTARTS:
            raise RunError(
                f"training diverged: {skipped} steps had a loss or a gradient that is not finite, down to a "
                f"learning rate of {self._rate(result):g}",
                hint="lower distill.learning_rate, or look for NaN in the teacher's weights; finished rounds are kept",
            )
        new = TrainingResult(self.layers, result.parameters, restarts=result.restarts + 1)
        console.print(
            f"{result.skipped} steps were not finite: the round starts again, learning rate {self._rate(new):g}"
        )
        return Attempt(new, skipped)

    def _complete(self, attempt: Attempt, rows: Rows, seed: int, weights: Mapping[str, Tensor]) -> bool:
        """Makes the steps that are left of an attempt; False where too many of them had to be skipped.

        Args:
            weights: what trains, as it was before the round, on the CPU.
        """
        result, batches = attempt.result, self._batches(rows, seed, attempt.result.steps)
        with (
            sharded(self.student, weights),
            self._in_master_dtype(),
            progress(self.description, self.steps) as advance,
        ):
            parameters = self._parameters()
            if attempt.checkpoint:
                _put(attempt.checkpoint.weights, parameters)
            optimizers = self._optimizers(attempt, parameters)
            average = WeightAverage(parameters, attempt.checkpoint)
            attempt.checkpoint = None  # or its files stay open
            started, tokens_before = time.monotonic(), result.tokens
            self._show_past(result, advance)
            while result.steps < self.steps:
                self._note(result, self._step(next(batches), parameters, optimizers, result))
                if self.recipe.averages(result.steps) and not result.curve[-1]["skipped"]:
                    average.add()
                seconds = time.monotonic() - started
                speed = (result.tokens - tokens_before) / seconds
                advance(note=_beside_bar(result.curve[-1], speed, self.device))
                if result.skipped > self.config.max_skipped_steps:
                    return False
                self._save_if_due(attempt, parameters, optimizers, average, seconds)
            average.put()
        return True

    def _batches(self, rows: Rows, seed: int, done: int) -> Iterator[list[dict[str, Tensor]]]:
        """This process's micro-batches of each step that is left."""
        processes = processes_of(self.device)
        rank, world = processes.process_index, processes.num_processes
        chosen = step_rows(rows, tokens=self.config.tokens_per_round, steps=self.steps, seed=seed)
        for indices in islice(chosen, done, None):
            yield micro_batches(rows, indices, self.config.batch_size, rank=rank, world=world)

    @contextmanager
    def _in_master_dtype(self) -> Iterator[None]:
        """For the time of the context, what trains has gradients and `MASTER_DTYPE`."""
        dtypes = {}
        for name, parameter in self._parameters().items():
            if not isinstance(parameter, DTensor):  # what is split has it already
                dtypes[name] = parameter.dtype
                parameter.data = parameter.data.to(MASTER_DTYPE)
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for name, parameter in self._parameters().items():
                parameter.requires_grad_(False)
                parameter.grad = None
                if name in dtypes:
                    parameter.data = parameter.data.to(dtypes[name])

    def _optimizers(self, attempt: Attempt, parameters: Mapping[str, nn.Parameter]) -> ScheduledOptimizers:
        """Optimizers and their schedules, new or as they were saved."""
        optimizers = self.recipe.optimizers(
            [*parameters.values()],
            [self.student.layer_of(name) is not None for name in parameters],
            rate=self._rate(attempt.result),
            steps=self.steps,
            done=attempt.result.steps - attempt.result.skipped,
        )
        if (checkpoint := attempt.checkpoint) and checkpoint.optimizers:
            restore(optimizers.optimizers, parameters, checkpoint.optimizer_tensors, checkpoint.optimizers)
        return optimizers

    def _show_past(self, result: TrainingResult, advance: Callable[..., None]) -> None:
        """Shows and logs the steps that were made before."""
        advance(result.steps)
        for point in result.curve:
            if self.log:
                self.log(point)

    def _note(self, result: TrainingResult, point: dict[str, float]) -> None:
        """Counts and logs a step."""
        result.steps += 1
        result.tokens += int(point["tokens"])
        result.skipped += int(point["skipped"])
        result.curve.append(point | {"tokens": result.tokens})
        if self.log:
            self.log(result.curve[-1])

    def _step(
        self,
        batches: list[dict[str, Tensor]],
        parameters: Mapping[str, nn.Parameter],
        optimizers: ScheduledOptimizers,
        result: TrainingResult,
    ) -> dict[str, float]:
        """One optimizer step over this process's micro-batches; skipped in all processes if it is not finite."""
        counts = self.gradients.count(batches)
        totals, result.halved = self.gradients.compute(batches, counts, result.halved)
        totals = sum_numbers(totals, self.device)
        sum_gradients(parameters.values())
        norm = gradient_norm(parameters.values(), self.device)
        finite = math.isfinite(totals["loss"]) and math.isfinite(norm)
        rate = optimizers.learning_rate
        if finite:
            scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            optimizers.step()
            self.losses.remember(totals)
        optimizers.zero_grad()
        point = {"learning_rate": rate, "gradient_norm": norm, "tokens": counts["tokens"], "skipped": float(not finite)}
        return totals | point

    def _save_if_due(
        self,
        attempt: Attempt,
        parameters: Mapping[str, nn.Parameter],
        optimizers: ScheduledOptimizers,
        average: WeightAverage,
        seconds: float,
    ) -> None:
        """Saves the state where that is due in a process, and after the last step; stops where a stop was asked for."""
        if not self.state:
            stop_if_any_asked(self.device)
            return
        result = attempt.result
        reasons = sum_numbers({"due": float(self.state.is_due), "stop": float(stop_asked())}, self.device)
        done = result.steps == self.steps
        if done or any(reasons.values()):
            saved = TrainingResult(**(asdict(result) | {"seconds": result.seconds + seconds}))
            # The optimizers have no more to do then, and hold twice as much as what trains.
            tensors, described = ({}, []) if done else collect(optimizers.optimizers, parameters)
            so_far = (saved, attempt.skipped, dict(self.losses.running))
            self.state.save(Checkpoint(parameters, tensors, described, *so_far, average.weights, average.steps))
        if reasons["stop"]:
            stop_if_any_asked(self.device)


@torch.no_grad()
def _put(saved: Mapping[str, SavedTensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives parameters their saved values."""
    for name, parameter in parameters.items():
        parameter.copy_(place_as(parameter, saved[name]))


def _beside_bar(point: Mapping[str, float], speed: float, device: torch.device) -> str:
    """What stands beside the bar: losses, learning rate, speed, memory."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    losses = " ".join(f"{name} {value:.4f}" for name, value in point.items() if name not in NO_LOSS)
    return f"{losses}, lr {point['learning_rate']:.1e}, {speed:,.0f} tokens/s, {memory / 2**30:.1f} GiB"
