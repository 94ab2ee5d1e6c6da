"""Layer calls and seconds of the parts of a run, and how many layers they read from the disk.

Counts what `run/loop.py` does round by round: scoring as `importance/work.py` counts it, generation as
`inference/decoding.py` batches it, and the layers that `training/forward.py` runs for teacher and student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from layerpeel.config.fields import TeacherTextConfig
from layerpeel.config.run import RunConfig
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.work import count_work
from layerpeel.inference.budget import Budget
from layerpeel.inference.requests import Generation, Request
from layerpeel.inference.teacher_text import SHARD, tokens_of
from layerpeel.model.surgery import KeptLayers
from layerpeel.plan.reading import PADDED, Reads
from layerpeel.plan.shape import Shape
from layerpeel.plan.speed import Speed
from layerpeel.report.measure import BATCH, NEW, PROMPT, REPEATS, SAMPLE_TOKENS, SAMPLES
from layerpeel.training.recipe import MASTER_DTYPE, TrainingRecipe

RIDGES_TRIED, FP64 = 4, 2  # in a repair, of each projection; how much longer its arithmetic takes than the layers'
SCORING_BYTES_ON_GPU = 8 * 2**30  # of the branches, where `score.memory` does not say


def _gap(layers: int, removed: int) -> range:
    start = (layers - removed) // 2
    return range(start, start + removed)


def _candidates(config: RunConfig, kept_layers: KeptLayers) -> list[int]:
    """Positions of the layers that may be removed."""
    protect = config.score.protect
    return [kept_layers.position(layer) for layer in kept_layers.removable(protect.first, protect.last, protect.layers)]


@dataclass(frozen=True)
class Training:
    """What the first round trains.

    Attributes:
        layers: teacher indices of the layers, of all that trains in them.
        trains_embeddings: whether teacher and student share no layer's computation.
        parameters: how many numbers; 0 where nothing trains.
        optimizer_bytes: of optimizer state.
    """

    layers: set[int]
    trains_embeddings: bool
    parameters: int
    optimizer_bytes: int


class Effort(NamedTuple):
    """Layer calls for each token, seconds of computing, and layers that are read where they stay on the disk."""

    calls: float
    seconds: float
    reads: float = 0.0


class Parts:
    """What a run's parts take, round by round.

    Args:
        split: over how many processes what trains is split.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: Shape,
        requests: Sequence[Sequence[Request]],
        speed: Speed,
        training: Training,
        recipe: TrainingRecipe,
        device: str,
        split: int = 1,
    ) -> None:
        self.config, self.shape, self.requests, self.speed = config, shape, requests, speed
        self.training, self.recipe, self.split = training, recipe, split
        self.flat = [request for task in requests for request in task]
        default = None if device == "cpu" else SCORING_BYTES_ON_GPU
        self.default_budget = Budget(default, torch.device("cpu")).bytes
        self.budget = config.score.memory or self.default_budget
        self.reads = Reads(shape, config.score.tokens, requests)
        # What the thread that reads takes of the processor, where that is what computes.
        self.reader = 1 / max(1, torch.get_num_threads() // recipe.processes) if device == "cpu" else 0.0

    def totals(self, rounds: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Layer calls, seconds, and bytes of layers that are read from the disk, where they stay there.

        Of scoring, evaluation, repair, training, the teacher's text, and of the report. While a layer runs the next one
        is read, so what takes longer counts; but on a CPU reading takes a core from computing.
        """
        repair = ["repair"] if self.config.distill.repairs else []
        sampling = ["sampling"] if self.config.has_teacher_text else []
        parts = ["scoring", "evaluation", *repair, "training", *sampling, "report"]
        calls, seconds, read = (dict.fromkeys(parts, 0.0) for _ in range(3))

        def add(part: str, effort: Effort) -> None:
            parameters = effort.reads * self.shape.layer_parameters if self.config.streams else 0.0
            reading = parameters * self.speed.read
            calls[part] += effort.calls
            read[part] += parameters * self.shape.itemsize
            seconds[part] += max(reading, effort.seconds + reading * self.reader) / self.recipe.processes

        if self.config.has_teacher_text:
            add("sampling", self._sampling(rounds))
        distill, every, total = self.config.distill, self.config.score.every, self.shape.layers
        add("evaluation", self._answering("task_quality", total, []))
        for removed in range(rounds):
            kept_layers = KeptLayers.full(total).without(_gap(total, removed))
            if not removed or (every and removed % every == 0):
                for name, candidates in self._scorings(kept_layers):
                    add("scoring", self._answering(name, len(kept_layers), candidates))
            if distill.repairs:
                add("repair", self._repair(removed + 1, distill.repairs.tokens))
            add("training", self._training(removed + 1, distill.in_rounds().tokens_per_round))
            add("evaluation", self._answering("task_quality", len(kept_layers) - 1, []))
        if last := distill.at_end(rounds):
            add("training", self._training(rounds, last.tokens_per_round))
            add("evaluation", self._answering("task_quality", total - rounds, []))
        if not self.config.streams:  # else it generates nothing
            calls["report"], seconds["report"] = self._report(range(total - rounds, total + 1))  # by one process
        return calls, seconds, read

    def _scorings(self, kept_layers: KeptLayers) -> list[tuple[str, list[int]]]:
        """The metrics of a round, each with the candidates it looks at."""
        score, candidates = self.config.score, _candidates(self.config, kept_layers)
        if score.shortlist and len(candidates) > score.shortlist.keep:
            middle = (len(candidates) - score.shortlist.keep) // 2
            shortlist = candidates[middle : middle + score.shortlist.keep]
            return [(score.shortlist.by, candidates), (score.decide, shortlist)]
        return [(score.decide, candidates)]

    def branches(self) -> dict[str, int]:
        """The most branches that `text`, and `tasks`, run on."""
        most = {"text": 0, "tasks": 1}
        for name, candidates in self._scorings(KeptLayers.full(self.shape.layers)):
            metric = make_metric(name)
            for need in metric.needs:
                most[need] = max(most[need], 1 + len(candidates) if metric.skips else 1)
        return most

    def _answering(self, name: str, layers: int, candidates: list[int]) -> Effort:
        """Of a metric (of an evaluation, without candidates)."""
        metric, budget = make_metric(name), self.budget if candidates else self.default_budget
        work = count_work(metric, layers, candidates, self.config.score.tokens, self.flat, self.shape.layers)
        steps, places, speed = 0, 1.0, self.speed
        if "tasks" in metric.needs:
            steps, places = self._decode_steps(1 + len(candidates), budget), PADDED
        read = (work.layer_tokens - work.decoded_layer_tokens) * places * speed.layer + work.head_tokens * speed.head
        written = work.decoded_layer_tokens * speed.decode_row + steps * layers * speed.decode_call
        return Effort(work.layer_tokens, read + written, self.reads.answering(metric, layers, candidates, budget))

    def _decode_steps(self, branches: int, budget: int) -> int:
        """Steps of generation, over all batches of all tasks, each of so many bytes."""
        tokens = self.shape.tokens_within(budget, branches)
        steps = 0
        for task in self.requests:
            generations = [request for request in task if isinstance(request, Generation)]
            if generations:
                longest = max(len(request.prompt) + request.max_new_tokens for request in generations)
                batches = -(-len(generations) // max(1, tokens // longest))
                steps += batches * max(request.max_new_tokens for request in generations)
        return steps

    def _sampling(self, rounds: int) -> Effort:
        """Of the text that the teacher writes."""
        config, shape, speed = self.config, self.shape, self.speed
        total = max(config.distill.text_tokens(rounds if config.stop.target_layers else 1), config.score.tokens)
        tokens = sum(
            tokens_of(source, sources, total)
            for sources in (config.distill.text, config.score.text or [])
            for source in sources
            if isinstance(source, TeacherTextConfig)
        )
        length = config.distill.sequence_length
        rows = max(1, min(SHARD, shape.tokens_within(self.budget, 1)) // length)
        each = shape.layers * (speed.decode_row + speed.decode_call / rows) + speed.head + speed.draw
        return Effort(tokens * shape.layers, tokens * each)

    def _report(self, depths: Iterable[int]) -> tuple[float, float]:
        """Layer calls and seconds of what `report/measure.py` measures and writes of students of these depths."""
        calls, seconds = 0.0, 0.0
        steps = NEW + REPEATS * (2 + 2 * NEW) + SAMPLES * SAMPLE_TOKENS
        rows = steps + REPEATS * NEW * (BATCH - 1)
        prompts = PROMPT * (1 + REPEATS * (2 + BATCH) + SAMPLES)
        for layers in depths:
            calls += layers * (prompts + rows)
            decoded = steps * self.speed.decode_call + rows * self.speed.decode_row
            seconds += layers * (prompts * self.speed.layer + decoded) + rows * self.speed.head
        return calls, seconds

    def _repair(self, removed: int, tokens: int) -> Effort:
        """Of a repair with so many layers gone, from the layer before the gap on.

        Sums and solutions are counted by their multiply-adds, which take as long as those of a layer: for each of two
        projections, and before the gap for both at once, X^T X and X^T E for each token; and for each ridge a factor, a
        solution and an error.
        """
        shape, layer = self.shape, self.speed.layer
        kept_layers = KeptLayers.full(shape.layers).without(_gap(shape.layers, removed))
        start = max(0, kept_layers.first_changed - 1)
        repaired = len(kept_layers) - start
        calls = tokens * (shape.layers + 3 * repaired + 1)
        inputs = repaired * (shape.width, shape.inner) + (shape.width + shape.inner,)
        sums = tokens * sum(size * (size + shape.width) for size in inputs)
        solved = RIDGES_TRIED * FP64 * sum(size**3 / 3 + 2 * size**2 * shape.width for size in inputs)
        each = layer / shape.layer_parameters  # seconds of a multiply-add
        alone = self.recipe.processes  # each process solves all
        seconds = calls * layer + each * (sums + alone * solved)
        return Effort(calls, seconds, alone * self.reads.repair(start, removed))

    def _training(self, removed: int, tokens: int) -> Effort:
        """Of training with so many layers gone; layer calls are forward."""
        config = self.recipe.config.model_copy(update={"tokens_per_round": tokens})
        recipe, speed, total = replace(self.recipe, config=config), self.speed, self.shape.layers
        steps = recipe.steps()
        kept_layers = KeptLayers.full(total).without(_gap(total, removed))
        chosen = recipe.layers(kept_layers)
        trained = set(self.training.layers if chosen is None else chosen) & set(kept_layers.kept)
        first = min((kept_layers.position(layer) for layer in trained), default=len(kept_layers))
        first = 0 if self.training.trains_embeddings else first
        run, graph = len(kept_layers) - min(first, kept_layers.first_changed), len(kept_layers) - first
        frozen = graph - len(trained)  # backward as long as forward
        streams = self.config.streams and self.split == 1  # else each process has its part of all in memory
        again = graph if recipe.config.activation_checkpointing else frozen * streams
        layer = speed.frozen_layer or speed.layer
        each = (total + run - len(trained) + frozen + again) * layer + len(trained) * speed.trained_layer
        calls = tokens * (total + run)
        updated = self.training.parameters * len(trained) / max(len(self.training.layers), 1)
        # Not shared, unless layers are split: each process updates all.
        updates = steps * updated * speed.update * recipe.processes / self.split
        sent = recipe.processes * self._exchange(recipe, updated, len(trained), graph)  # each waits for all of it
        seconds = tokens * (each + speed.head_loss) + updates + sent
        batches = steps * self._batches_of_step(recipe)
        reads = self.reads.training(batches, graph, len(trained)) if streams else total
        return Effort(calls, seconds, recipe.processes * reads)

    def _batches_of_step(self, recipe: TrainingRecipe) -> int:
        """Micro-batches of a process in an optimizer step."""
        rows = recipe.step_tokens / (recipe.config.sequence_length * recipe.processes)
        return max(1, math.ceil(rows / recipe.config.batch_size))

    def _exchange(self, recipe: TrainingRecipe, updated: float, trained: int, graph: int) -> float:
        """Seconds of a training in which processes exchange gradients and, where they are split, layers.

        What is split is gathered in each micro-batch: embeddings and head, the teacher's layers, the student's that
        train, and in the backward pass those that gradients go through; and all of it at the end.

        Args:
            updated: how many numbers train.
            trained, graph: layers that train, and that gradients go through.
        """
        shape, speed, steps, wide = self.shape, self.speed, recipe.steps(), MASTER_DTYPE.itemsize * updated
        if recipe.processes == 1:
            return 0.0
        if self.split == 1:
            return steps * wide * speed.add_up
        layer, batches = shape.itemsize * shape.layer_parameters, steps * self._batches_of_step(recipe)
        in_batch = (shape.layers + trained + graph) * layer + 2 * shape.itemsize * shape.head_parameters
        at_end = bool(steps) * shape.itemsize * (shape.parameters + updated)
        return batches * wide * speed.add_up + (batches * in_batch + at_end) * speed.gather
