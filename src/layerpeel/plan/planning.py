"""What a run will take in memory, layer calls and time, from the teacher's config and the run's, before any of it.

Layers are taken to go from the middle, as one gap; each round scores, trains and is measured on the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from layerpeel.config.run import RunConfig
from layerpeel.inference.requests import Request
from layerpeel.model.surgery import KeptLayers
from layerpeel.plan.memory import TrainingMemory, repair_memory, resident_bytes, scoring_memory
from layerpeel.plan.parts import Parts, Training, _candidates, _gap
from layerpeel.plan.shape import Outline, Shape, empty_model, shape_of
from layerpeel.plan.speed import Speed
from layerpeel.training.recipe import TrainingRecipe


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        shape: the teacher's sizes.
        rounds: how many layers go.
        trained: parameters that train in the first round.
        training_memory, scoring_memory, repair_memory: bytes on each device, by what they are for; none where there is
            no repair.
        end_memory: the same when a training ends in which weights were split; none where they are not.
        layer_tokens: tokens through a layer in all, of `scoring`, `evaluation` (of teacher and students on the tasks),
            `repair`, `training` (teacher and student, forward), `sampling`, where the teacher writes text, `report`.
        seconds: of the same.
        read: bytes of layers that the same read from the disk; 0 where layers are in memory.
        gpus: how many share the work.
    """

    shape: Shape
    rounds: int
    trained: int
    training_memory: dict[str, float]
    scoring_memory: dict[str, float]
    repair_memory: dict[str, float]
    end_memory: dict[str, float]
    layer_tokens: dict[str, float]
    seconds: dict[str, float]
    read: dict[str, float]
    gpus: int

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """The memory of each phase that there is, by its name."""
        phases = {
            "repair": self.repair_memory,
            "training": self.training_memory,
            "its end": self.end_memory,
            "scoring": self.scoring_memory,
        }
        return {name: parts for name, parts in phases.items() if parts}

    @property
    def peak(self) -> float:
        """The most bytes on each device."""
        return max(sum(parts.values()) for parts in self.phases.values())

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
        fsdp: whether they split layers, and what trains in them, for the time of training.

    Raises:
        InputError: the config selects nothing to train.
    """
    recipe = TrainingRecipe(config.distill, gpus)
    model = empty_model(teacher, dtype, trust_remote_code=config.trust_remote_code)
    shape = shape_of(model, recipe.micro_batch_rows, config.distill.sequence_length, split=fsdp)
    student = Outline(model, _gap(shape.layers, 1))
    training = _training(student, recipe)
    rounds, trained, split = _rounds(config, shape), training.parameters, gpus if fsdp else 1
    parts = Parts(config, shape, requests, speed(shape), training, recipe, device, split)
    repairs, graph = config.distill.repairs, shape.layers - 1 - student.shared_prefix
    memory = TrainingMemory(shape, recipe, trained, training.optimizer_bytes, graph, device, split)
    phases = (
        memory.step(),
        scoring_memory(shape, config.score, requests, trained, parts.branches(), parts.budget, device),
        repair_memory(shape, repairs.tokens, device, streamed=config.streams) if repairs else {},
        memory.end(),
    )
    if device == "cpu":  # read last: measuring has by now imported the libraries that a run uses
        resident = {"Python and its libraries": resident_bytes()}
        for phase in filter(None, phases):
            phase.update(resident)
    return Plan(shape, rounds, trained, *phases, *parts.totals(rounds), gpus)


def _training(student: Outline, recipe: TrainingRecipe) -> Training:
    """What the first round trains; the student's own copies of it are made."""
    names, by_name = recipe.parameters(student), student.parameters()
    parameters = [by_name[name] for name in names]
    layers = [student.layer_of(name) for name in names]
    student.add_trained(names)
    return Training(
        layers={layer for layer in layers if layer is not None},
        trains_embeddings=student.trains_embeddings,
        parameters=sum(parameter.numel() for parameter in parameters) if recipe.steps() else 0,
        optimizer_bytes=recipe.optimizer_bytes(parameters, [layer is not None for layer in layers]),
    )


def _rounds(config: RunConfig, shape: Shape) -> int:
    """How many layers go, if no quality floor ends the run before."""
    free = len(_candidates(config, KeptLayers.full(shape.layers)))
    wanted = [min(free, shape.layers - 1)]  # one layer stays
    if config.stop.target_layers is not None:
        wanted.append(shape.layers - config.stop.target_layers)
    if config.stop.max_params is not None:
        wanted.append(-(-(shape.parameters - config.stop.max_params) // shape.layer_parameters))
    return max(0, min(wanted))
