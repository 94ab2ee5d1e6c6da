"""The weighted sum of the losses that a config lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerpeel.config.distill import LossConfig
from layerpeel.losses.base import StepOutputs
from layerpeel.losses.logits import LogitLoss, sweep
from layerpeel.losses.registry import make_loss

BALANCE_DECAY = 0.9  # of the running mean of a loss, for each step


class LossSum:
    """A weighted sum of losses.

    Attributes:
        running: the running mean of each loss, where they are balanced.
        without_gradient: losses that turned out not to depend on the student's weights.
    """

    def __init__(self, configs: Mapping[str, LossConfig], *, balance: bool = False) -> None:
        """Creates the losses of a config.

        Args:
            balance: scale every loss by the first one's running mean over its own, before its weight (Minitron's
                dynamic weight, arXiv 2407.14679).

        Raises:
            InputError: an unknown loss or option.
        """
        self.weights = {name: config.weight for name, config in configs.items()}
        self.losses = {name: make_loss(name, config) for name, config in configs.items()}
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
            total, values = sweep([*on_logits.values()], [weights[name] for name in on_logits], outputs)
            parts |= dict(zip(on_logits, values, strict=True))
        for name, loss in self.losses.items():
            if name not in on_logits:
                part = loss(outputs)
                if torch.is_grad_enabled() and not part.requires_grad:
                    self.without_gradient.add(name)
                total = total + weights[name] * part
                parts[name] = part.detach()
        return total, {name: parts[name] for name in self.losses}

    def remember(self, parts: Mapping[str, float]) -> None:
        """Updates the running means with a step's losses."""
        if self.balance:
            for name in self.losses:
                past = self.running.get(name, parts[name])
                self.running[name] = BALANCE_DECAY * past + (1 - BALANCE_DECAY) * parts[name]

    def _scale(self, name: str) -> float:
        mean = self.running.get(name, 0.0)
        return self.running[next(iter(self.losses))] / mean if mean > 0 else 1.0
