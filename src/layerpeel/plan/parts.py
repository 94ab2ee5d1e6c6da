"""Layer calls and seconds of the parts of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerpeel.config.run import RunConfig
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.work import count_work
from layerpeel.inference.budget import Budget, bytes_of_token
from layerpeel.inference.requests import Generation, Request
from layerpeel.model.surgery import KeptLayers
from layerpeel.plan.shape import Shape
from layerpeel.plan.speed import Speed

PADDED = 1.2  # places in rows, for a token of a task: on the stories, rows are filled to 75 to 86 %
SCORING_BYTES_ON_GPU = 8 * 2**30  # of the streams, where `score.memory` does not say


def _gap(layers: int, removed: int) -> range:
    start = (layers - removed) // 2
    return range(start, start + removed)


def _candidates(config: RunConfig, depth: KeptLayers) -> list[int]:
    """Positions that may go."""
    protect = config.score.protect
    return [depth.position(layer) for layer in depth.removable(protect.first, protect.last, protect.layers)]


class _Parts:
    """Layer calls and seconds of a run's parts, round by round."""

    def __init__(
        self,
        config: RunConfig,
        shape: Shape,
        requests: Sequence[Sequence[Request]],
        speed: Speed,
        layers: set[int],
        alone: bool,
        device: str,
        trained: int,
    ) -> None:
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
            depth = KeptLayers.full(total).without(_gap(total, removed))
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

    def _scorings(self, depth: KeptLayers) -> list[tuple[str, list[int]]]:
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
        for name, candidates in self._scorings(KeptLayers.full(self.shape.layers)):
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
        depth = KeptLayers.full(total).without(_gap(total, removed))
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
