"""The losses a student is trained by, one a file, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from layerpeel.config import LossConfig
from layerpeel.errors import InputError, resolve_class
from layerpeel.losses.base import NO_LABEL, Loss, StepOutputs
from layerpeel.losses.cross_entropy import CrossEntropy
from layerpeel.losses.hidden_cosine import HiddenCosine
from layerpeel.losses.hidden_mse import HiddenMSE
from layerpeel.losses.jensen_shannon import JensenShannon
from layerpeel.losses.kl import KL
from layerpeel.losses.logits import LogitLoss, sweep
from layerpeel.losses.reverse_kl import ReverseKL

LOSSES: dict[str, type[Loss]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "cross_entropy": CrossEntropy,
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
}
MEMORY_OF_BALANCE = 0.9  # share of the past in the running mean of a loss


class LossSum:
    """A weighted sum of losses.

    Attributes:
        running: the running mean of each loss, where they are balanced.
        without_gradient: losses that turned out not to depend on the student's weights.
    """

    def __init__(self, configs: Mapping[str, LossConfig], *, balance: bool = False) -> None:
        """Takes the losses of a config.

        Args:
            balance: scale every loss by the first one's running mean over its own, before its weight (Minitron's
                dynamic weight, arXiv 2407.14679).

        Raises:
            InputError: an unknown loss or option.
        """
        self.weights = {name: config.weight for name, config in configs.items()}
        self.losses = {name: _make_loss(name, config) for name, config in configs.items()}
        self.balance, self.running = balance, dict[str, float]()
        self.without_gradient: set[str] = set()

    def hidden_layers(self, trained: Sequence[int]) -> list[int]:
        """The layers whose outputs the losses read, of those in training (teacher indices)."""
        return sorted({layer for loss in self.losses.values() for layer in loss.hidden_layers(trained)})

    def __call__(self, outputs: StepOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, to be differentiated, and each part without its weight."""
        weights = {name: weight * self._scale(name) for name, weight in self.weights.items()}
        total = torch.zeros((), device=outputs.mask.device)
        parts: dict[str, Tensor] = {}
        on_logits = {name: loss for name, loss in self.losses.items() if isinstance(loss, LogitLoss)}
        if on_logits:
            total, found = sweep([*on_logits.values()], [weights[name] for name in on_logits], outputs)
            parts |= dict(zip(on_logits, found, strict=True))
        for name, loss in self.losses.items():
            if name not in on_logits:
                part = loss(outputs)
                if torch.is_grad_enabled() and not part.requires_grad:
                    self.without_gradient.add(name)
                total = total + weights[name] * part
                parts[name] = part.detach()
        return total, {name: parts[name] for name in self.losses}

    def remember(self, parts: Mapping[str, float]) -> None:
        """Takes a step's losses into the running means."""
        if self.balance:
            for name in self.losses:
                past = self.running.get(name, parts[name])
                self.running[name] = MEMORY_OF_BALANCE * past + (1 - MEMORY_OF_BALANCE) * parts[name]

    def _scale(self, name: str) -> float:
        own = self.running.get(name, 0.0)
        return self.running[next(iter(self.losses))] / own if own > 0 else 1.0


def _make_loss(name: str, config: LossConfig) -> Loss:
    loss = resolve_class(name, LOSSES, "loss", Loss)
    try:
        return loss.model_validate(config.model_extra or {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(
            f"distill.losses.{name}.{field}: {first['msg'].lower()}",
            hint=f"options of {name}: weight, {', '.join(loss.model_fields)}",
        ) from None


__all__ = ["LOSSES", "NO_LABEL", "Loss", "LossSum", "StepOutputs"]
