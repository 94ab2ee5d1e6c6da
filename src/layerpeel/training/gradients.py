"""Gradients and losses of one optimizer step, micro-batch by micro-batch, in as much memory as there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from layerpeel.errors import InputError, RunError
from layerpeel.losses.loss_sum import LossSum
from layerpeel.processes.distributed import sum_numbers
from layerpeel.processes.memory import memory_is_full
from layerpeel.processes.progress import console
from layerpeel.training.forward import FINAL, next_tokens, run_both
from layerpeel.training.recipe import TrainingRecipe, autocast
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache


class StepGradients:
    """Computes a step's gradients, in this process, into the `grad` of what trains.

    Args:
        layers: teacher indices of the layers that train.
        cache: where teacher states are kept.
    """

    def __init__(
        self,
        student: Student,
        recipe: TrainingRecipe,
        losses: LossSum,
        layers: Sequence[int],
        cache: TeacherCache | None,
    ) -> None:
        self.student, self.recipe, self.losses, self.cache = student, recipe, losses, cache
        self.config, self.device = recipe.config, student.model.device
        self.hidden_layers = losses.hidden_layers(layers)
        self.autocast = partial(autocast, self.device.type, student.model.dtype)

    def count(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Real `tokens` and `labels` of a step in all processes; gives each micro-batch its `labels`, [B, T]."""
        for batch in batches:
            batch["labels"] = next_tokens(batch)
        counts = {
            "tokens": float(sum(batch["attention_mask"].sum() for batch in batches)),
            "labels": float(sum((batch["labels"] >= 0).sum() for batch in batches)),
        }
        return sum_numbers(counts, self.device)

    def compute(
        self, batches: Sequence[Mapping[str, Tensor]], counts: Mapping[str, float], halved: int
    ) -> tuple[dict[str, float], int]:
        """Adds up the gradients of this process's micro-batches, in smaller ones where memory runs out.

        Losses are shares of the step's, so they add up to the same sum whatever the micro-batches are cut to.

        Returns:
            this process's share of the losses, and how often micro-batches are halved now.

        Raises:
            RunError: memory does not suffice for one row; or for the rows, where layers are split between processes,
                which then are not at the same place.
        """
        if self.student.layerwise.stand_ins:  # processes have to cut alike, and their longest micro-batches differ
            halved = 0
        most = max(len(batch["input_ids"]) for batch in batches)
        while not (totals := self._accumulate(batches, counts, rows := max(1, most >> halved))):
            self._check_can_halve(rows)
            halved += 1
            console.print(f"out of memory: micro-batches of {max(1, most >> halved)} rows from here")
            for parameter in self.student.parameters().values():
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return totals, halved

    def _accumulate(
        self, batches: Sequence[Mapping[str, Tensor]], counts: Mapping[str, float], rows: int
    ) -> dict[str, float]:
        """The losses of a step, `rows` at a time; none where memory ran out."""
        totals: dict[str, float] = {}
        try:
            for batch in batches:
                for start in range(0, len(batch["input_ids"]), rows):
                    part = {name: value[start : start + rows] for name, value in batch.items()}
                    for name, value in self._backward(part, counts).items():
                        totals[name] = totals.get(name, 0.0) + float(value)
        except Exception as error:
            if not memory_is_full(error):
                raise
            return {}
        return totals

    def _check_can_halve(self, rows: int) -> None:
        if rows == 1 or self.student.layerwise.stand_ins:
            raise RunError(
                f"out of memory in training, with {rows} rows of {self.config.sequence_length} tokens at a time",
                hint="lower distill.batch_size (the steps stay the same) or distill.sequence_length, or set "
                "distill.activation_checkpointing: true",
            )

    def _lacked_by_any(self, states: Mapping[int, Tensor] | None) -> bool:
        """Whether a process has to run the teacher: where its layers are split, all of them run it, or none."""
        return bool(sum_numbers({"lacking": float(states is None)}, self.device)["lacking"])

    def _backward(self, batch: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Tensor]:
        """Adds a micro-batch's gradients; gives its share of the losses."""
        layers = [*self.hidden_layers, FINAL]
        states = cached = self.cache.find(batch, layers, self.student.model) if self.cache else None
        if self.cache and self.student.layerwise.stand_ins and self._lacked_by_any(cached):
            states = None
        with self.autocast():
            outputs = run_both(
                self.student,
                batch,
                self.hidden_layers,
                teacher_states=states,
                step_tokens=int(counts["tokens"]),
                step_labels=int(counts["labels"]),
                recompute=self.config.activation_checkpointing,
            )
            if self.cache and states is None:
                computed = {layer: outputs.teacher_hidden[layer] for layer in layers}
                states = cached or self.cache.keep(batch, computed)
                outputs = replace(outputs, teacher_hidden=states, teacher_final=states[FINAL])
            with self.student.heads_loaded():
                loss, parts = self.losses(outputs)
        if not loss.requires_grad:
            raise InputError(
                f"distill.losses: none of {', '.join(parts)} depends on what trains, so there is no gradient",
                hint="name another loss, or train what it sees (distill.train)",
            )
        loss.backward()
        return {"loss": loss.detach(), **parts}
