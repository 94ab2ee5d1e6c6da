"""The weights of a projection as one matrix, and the parameters that a change of it makes.

Shapes: D hidden, I what enters the projection, and one more where it has a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerpeel.inference.residual_writers import Projection

SMALLEST_GAIN = 1e-6  # of the largest: where a norm lets less through, nothing is changed


@dataclass(frozen=True)
class LinearWeights:
    """The weights of a projection, as [I, D], with the bias below them where there is one.

    Attributes:
        matrix: in fp64.
        parameters: the module's own, by name.
        transposed: whether the module's weight is [I, D].
        gains: [D] of a norm that follows; ones where none does.
    """

    matrix: Tensor
    parameters: Mapping[str, Tensor]
    transposed: bool
    gains: Tensor

    @classmethod
    def of(cls, module: nn.Module, projection: Projection) -> LinearWeights:
        parameters = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
        gains = torch.ones(()) if projection.gains is None else projection.gains
        matrix = _matrix(parameters, projection.transposed)
        return cls(matrix, parameters, projection.transposed, gains.to(matrix))

    def changed(self, change: Tensor, storage: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
        """The parameters after a change of what is written, rounded to what is saved.

        Args:
            change: [I, D] in fp64; of what comes after the norm, if one follows.
            storage: gives the dtype that a parameter is saved in.
        """
        steady = self.gains.abs() > SMALLEST_GAIN * self.gains.abs().max()
        matrix = self.matrix + torch.where(steady, change.to(self.matrix) / self.gains, 0.0)
        inputs = len(matrix) - ("bias" in self.parameters)
        new = {"weight": matrix[:inputs] if self.transposed else matrix[:inputs].T, "bias": matrix[inputs:].flatten()}
        return {n: new[n].to(storage(n)).to(value.dtype).contiguous() for n, value in self.parameters.items()}

    def change_to(self, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The change [I, D] that other parameters are, on the device of `like`."""
        return ((_matrix(parameters, self.transposed) - self.matrix) * self.gains).to(like)


def _matrix(parameters: Mapping[str, Tensor], transposed: bool) -> Tensor:
    weight = parameters["weight"] if transposed else parameters["weight"].T
    rows = [weight, *(value[None] for name, value in parameters.items() if name == "bias")]
    matrix = torch.cat(rows)
    return matrix.to("cpu" if matrix.device.type == "mps" else matrix.device).double()
