"""The losses a student is trained by, one a file, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError
from torch import Tensor

from layerpeel.config import LossConfig
from layerpeel.errors import InputError, resolve_class
from layerpeel.losses.base import Loss, StepOutputs
from layerpeel.losses.hidden_mse import HiddenMSE
from layerpeel.losses.kl import KL

LOSSES: dict[str, type[Loss]] = {"kl": KL, "hidden_mse": HiddenMSE}


class LossSum:
    """A weighted sum of losses."""

    def __init__(self, configs: Mapping[str, LossConfig]) -> None:
        self.weights = {name: config.weight for name, config in configs.items()}
        self.losses = {name: _make_loss(name, config) for name, config in configs.items()}

    def __call__(self, outputs: StepOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, to be differentiated, and each part without its weight."""
        parts = {name: loss(outputs) for name, loss in self.losses.items()}
        total = sum((self.weights[name] * part for name, part in parts.items()), outputs.student_final.new_zeros(()))
        return total, {name: part.detach() for name, part in parts.items()}


def _make_loss(name: str, config: LossConfig) -> Loss:
    loss = resolve_class(name, LOSSES, "loss")
    try:
        return loss.model_validate(config.model_extra or {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(
            f"distill.losses.{name}.{field}: {first['msg'].lower()}",
            hint=f"options of {name}: weight, {', '.join(loss.model_fields)}",
        ) from None


__all__ = ["LOSSES", "Loss", "LossSum", "StepOutputs"]
