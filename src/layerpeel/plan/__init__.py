"""What a run will take in memory, layer calls and time, from the teacher's config and the run's, before any of it.

Layers are taken to go from the middle, as one gap; each round scores, trains and is measured on the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from layerpeel.budget import Budget, bytes_of_token
from layerpeel.config import RunConfig
from layerpeel.importance import count_work, make_metric
from layerpeel.plan.memory import resident_bytes, scoring_memory, training_memory
from layerpeel.plan.shape import Outline, Shape, empty_model, shape_of
from layerpeel.plan.speed import Speed
from layerpeel.student import parameters_to_train
from layerpeel.surgery import Depth
from layerpeel.tasks.base import Generation, Request

PADDED = 1.2  # places in rows, for a token of a task: on the stories, rows are filled to 75 to 86 %
SCORING_BYTES_ON_GPU = 8 * 2**30  # of the streams, where `score.memory` does not say


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        shape: the teacher's sizes.
        rounds: how many layers go.
        trained: parameters that train in the first round.
        training_memory, scoring_memory: bytes on each device, by what they are for.
        layer_tokens: tokens through a layer in all, of `scoring`, `evaluation` (of teacher and students on the tasks)
            and `training` (teacher and student, forward).
        seconds: of the same.
        gpus: how many share the work.
    """

    shape: Shape
    rounds: int
    trained: int
    training_memory: dict[str, float]
    scoring_memory: dict[str, float]
    layer_tokens: dict[str, float]
    seconds: dict[str, float]
    gpus: int

    @property
    def peak(self) -> float:
        """The most bytes on each device."""
        return max(sum(self.training_memory.values()), sum(self.scoring_memory.values()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}


def plan_run(
    teacher: PretrainedConfig,
    config: RunConfig,
    requests: Sequence[Sequence[Request]],
    speed: Callable[[Shape], Speed],
    *,
    dtype: torch.dtype,
    device: str,
    gpus: int = 1,
    fsdp: bool = False,
) -> Plan:
    """Plans a run.

    Args:
        teacher: its config; no weights are read.
        requests: of each task.
        speed: gives that of a shape.
        dtype: of the frozen weights.
        device: `cpu` or `cuda`, to whose memory chunks are sized.
        gpus: processes that share the work.
        fsdp: whether they split what trains.

    Raises:
        InputError: the config selects nothing to train.
    """
    distill, model = config.distill, empty_model(teacher, dtype)
    shape = shape_of(model, distill.batch_size, distill.sequence_length)
    rounds, student = _rounds(config, shape), Outline(model, _gap(shape.layers, 1))
    names = parameters_to_train(
        student, distill.train, radius=distill.radius, norm=distill.train_norm, head=distill.train_head
    )
    here = student.parameters()
    trained = sum(here[name].numel() for name in names) if distill.tokens_per_round else 0
    layers = {layer for name in names if (layer := student.layer_of(name)) is not None}
    student.own(names)
    parts = _Parts(config, shape, requests, speed(shape), layers, student.begins_alone, device, trained)
    # now, as measuring has brought in the libraries that a run uses
    process = {"Python and its libraries": resident_bytes()} if device == "cpu" else {}
    graph, split = shape.layers - 1 - student.shared_prefix, gpus if fsdp else 1
    return Plan(
        shape, rounds, trained,
        training_memory(shape, distill, trained, graph, device, split) | process,
        scoring_memory(shape, config.score, requests, trained, parts.streams(), parts.budget, device) | process,
        *parts.totals(rounds, gpus), gpus,
    )  # fmt: skip


def _rounds(config: RunConfig, shape: Shape) -> int:
    """How many layers go, if no quality floor ends the run before."""
    free = len(_candidates(config, Depth.full(shape.layers)))
    wanted = [free]
    if config.stop.target_layers is not None:
        wanted.append(shape.layers - config.stop.target_layers)
    if config.stop.max_params is not None:
        wanted.append(-(-(shape.parameters - config.stop.max_params) // shape.layer_parameters))
    return max(0, min(wanted))


def _gap(layers: int, removed: int) -> range:
    start = (layers - removed) // 2
    return range(start, start + removed)


def _candidates(config: RunConfig, depth: Depth) -> list[int]:
    """Positions that may go."""
    protect = config.score.protect
    return [depth.position(layer) for layer in depth.removable(protect.first, protect.last, protect.layers)]


class _Parts:
    """Layer calls and seconds of a run's parts, round by round."""

    def __init__(
        self, config: RunConfig, shape: Shape, requests: Sequence[Sequence[Request]], speed: Speed, layers: set[int],
        alone: bool, device: str, trained: int,
    ) -> None:  # fmt: skip
        self.config, self.shape, self.requests, self.speed = config, shape, requests, speed
        self.layers, self.alone, self.trained = layers, alone, trained
        self.flat = [request for own in requests for request in own]
        default = None if device == "cpu" else SCORING_BYTES_ON_GPU
        self.budget = Budget(config.score.memory or default, torch.device("cpu")).bytes

    def totals(self, rounds: int, gpus: int) -> tuple[dict[str, float], dict[str, float]]:
        """Layer calls, and seconds, of scoring, evaluation and training."""
        calls, seconds = (dict.fromkeys(("scoring", "evaluation", "training"), 0.0) for _ in range(2))

        def add(part: str, own: tuple[float, float]) -> None:
            calls[part] += own[0]
            seconds[part] += own[1] / gpus

        distill, every, total = self.config.distill, self.config.score.every, self.shape.layers
        add("evaluation", self._asked("task_quality", total, []))
        for removed in range(rounds):
            depth = Depth.full(total).without(_gap(total, removed))
            if not removed or (every and removed % every == 0):
                for name, candidates in self._scorings(depth):
                    add("scoring", self._asked(name, len(depth), candidates))
            if distill.when == "each_round":
                add("training", self._trained(removed + 1, distill.tokens_per_round, gpus))
            add("evaluation", self._asked("task_quality", len(depth) - 1, []))
        if last := distill.at_end(rounds):
            add("training", self._trained(rounds, last.tokens, gpus))
            add("evaluation", self._asked("task_quality", total - rounds, []))
        return calls, seconds

    def _scorings(self, depth: Depth) -> list[tuple[str, list[int]]]:
        """The metrics of a round, each with the candidates it looks at."""
        score, candidates = self.config.score, _candidates(self.config, depth)
        if score.shortlist and len(candidates) > score.shortlist.keep:
            middle = (len(candidates) - score.shortlist.keep) // 2
            few = candidates[middle : middle + score.shortlist.keep]
            return [(score.shortlist.by, candidates), (score.decide, few)]
        return [(score.decide, candidates)]

    def streams(self) -> dict[str, int]:
        """How many streams text, and tasks, have at most."""
        found = {"text": 0, "tasks": 1}
        for name, candidates in self._scorings(Depth.full(self.shape.layers)):
            metric = make_metric(name)
            for need in metric.needs:
                found[need] = max(found[need], 1 + len(candidates) if metric.skips else 1)
        return found

    def _asked(self, name: str, layers: int, candidates: list[int]) -> tuple[float, float]:
        """Layer calls and seconds of a metric (of an evaluation, without candidates)."""
        metric, own = make_metric(name), self.shape.layers
        work = count_work(metric, layers, candidates, self.config.score.tokens, self.flat, own)
        steps, places = (self._decode_steps(1 + len(candidates)), PADDED) if "tasks" in metric.needs else (0, 1.0)
        speed = self.speed
        read = (work.layer_tokens - work.decoded_layer_tokens) * places * speed.layer + work.head_tokens * speed.head
        written = work.decoded_layer_tokens * speed.decode_row + steps * layers * speed.decode_call
        return float(work.layer_tokens), read + written

    def _decode_steps(self, streams: int) -> int:
        """Steps of generation, over all batches of all tasks."""
        tokens = self.budget // bytes_of_token(streams, self.shape.width, self.shape.itemsize)
        steps = 0
        for own in self.requests:
            written = [request for request in own if isinstance(request, Generation)]
            if written:
                longest = max(len(request.prompt) + request.max_new_tokens for request in written)
                batches = -(-len(written) // max(1, tokens // longest))
                steps += batches * max(request.max_new_tokens for request in written)
        return steps

    def _trained(self, removed: int, tokens: int, gpus: int) -> tuple[float, float]:
        """Layer calls, forward, and seconds of training with so many layers gone."""
        distill, speed, total = self.config.distill, self.speed, self.shape.layers
        step = distill.batch_size * distill.accumulation * distill.sequence_length * gpus
        steps = max(1, tokens // step) if tokens else 0
        depth = Depth.full(total).without(_gap(total, removed))
        named = {"neighbours": depth.neighbours(distill.radius), "above": depth.above(), "all": depth.kept}
        trained = set(named.get(distill.train, self.layers)) & set(depth.kept)
        first = min((depth.position(layer) for layer in trained), default=len(depth))
        shared = 0 if self.alone else min(first, depth.first_changed)
        graph = len(depth) - shared
        frozen = graph - len(trained)
        again = graph * speed.layer if distill.activation_checkpointing else 0.0
        each = total * speed.layer + len(trained) * speed.trained_layer + 2 * frozen * speed.layer + again
        calls = steps * step * (total + graph)
        updates = steps * self.trained * len(trained) / max(len(self.layers), 1) * speed.update * gpus
        return float(calls), steps * step * (each + speed.head_loss) + updates


__all__ = ["Plan", "Shape", "Speed", "plan_run"]
