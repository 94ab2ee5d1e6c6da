"""The mean of the weights over the last steps of a training (Izmailov et al., arXiv 1803.05407), as in torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from layerpeel.training.optimizer_state import place_as
from layerpeel.training.state import Checkpoint
from layerpeel.training.state_files import SavedTensor


class WeightAverage:
    """A mean over steps of parameters, which may be split between processes.

    Attributes:
        parameters: by name.
        weights: their mean so far, by name, placed as they are; none before the first step.
        steps: over how many steps.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], checkpoint: Checkpoint[SavedTensor] | None = None
    ) -> None:
        """Begins, or goes on from a checkpoint, in which the parameters may have been split in another way."""
        self.parameters, self.steps = parameters, checkpoint.averaged if checkpoint else 0
        saved = checkpoint.average if checkpoint else {}
        self.weights = {name: place_as(parameters[name], value) for name, value in saved.items()}
        self._update = get_swa_multi_avg_fn()

    @torch.no_grad()
    def add(self) -> None:
        """Adds the weights as they are after a step."""
        if self.steps:
            current = [self.parameters[name] for name in self.weights]
            self._update(_parts(self.weights.values()), _parts(current), self.steps)
        else:
            self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.steps += 1

    @torch.no_grad()
    def put(self) -> None:
        """Gives the parameters their mean; they stay as they are where there is none."""
        for name, value in self.weights.items():
            self.parameters[name].copy_(value)


def _parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each."""
    return [value.to_local() if isinstance(value, DTensor) else value.detach() for value in tensors]
