"""How a round trains: what trains, the optimizer and its schedule, how many steps of how many tokens, in which dtypes.

The trainer does what a recipe says, and `layerpeel.plan` counts it from the same recipe.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from layerpeel.config.distill import DistillConfig, Packing
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.surgery import KeptLayers
from layerpeel.training.optimizer_state import collect
from layerpeel.training.optimizers import (
    ScheduledOptimizers,
    make_optimizers,
    optimizer_class,
    state_bytes,
    takes_only_matrices,
    total_state_bytes,
    try_optimizer,
)
from layerpeel.training.student import Student
from layerpeel.training.trainable import layers_to_train, parameters_to_train

# An optimizer step of `tokens_per_step: auto`. At small budgets many small steps beat few large ones, down to about 512
# tokens, below which a step hardly gets cheaper; a large budget has steps to spare, and larger ones use a GPU better.
STEPS = 400
FEWEST_STEP_TOKENS, MOST_STEP_TOKENS = 512, 2**19
MASTER_DTYPE = torch.float32  # of parameters while they train, of their gradients, and of what is made from them


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model of that dtype runs while its trained parameters have `MASTER_DTYPE`.

    Without the cache of cast parameters, which would hold all of them until the losses are known; none is cast twice.
    """
    return torch.autocast(device_type, dtype, enabled=dtype is not MASTER_DTYPE, cache_enabled=False)


def _schedule(config: DistillConfig, optimizer: Optimizer, warmup: int, steps: int, done: int) -> LambdaLR:
    """The learning rate of each of so many steps, of which some were made before."""
    if config.lr_scheduler_type == "constant_with_warmup":
        return get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=done - 1)
    falling = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}
    return falling[config.lr_scheduler_type](optimizer, warmup, steps, last_epoch=done - 1)


@dataclass(frozen=True)
class TrainingRecipe:
    """How a round trains.

    Attributes:
        config: the section `distill`.
        processes: how many share each step.
    """

    config: DistillConfig
    processes: int = 1

    # What a step is

    @property
    def step_tokens(self) -> int:
        """Real tokens of an optimizer step, over all processes."""
        config, tokens = self.config, self.config.tokens_per_step
        if tokens == "auto":
            power = round(math.log2(max(config.tokens_per_round / STEPS, 1)))
            return max(min(max(2**power, FEWEST_STEP_TOKENS), MOST_STEP_TOKENS), config.sequence_length)
        return max(tokens, config.sequence_length)

    def steps(self) -> int:
        """Optimizer steps of a round: at least one, unless there are no tokens."""
        tokens = self.config.tokens_per_round
        return max(1, round(tokens / self.step_tokens)) if tokens else 0

    @property
    def micro_batch_rows(self) -> int:
        """The most rows of a micro-batch, if rows are full; documents of their own may be as short as a token."""
        shortest = 1 if self.config.packing == "none" else self.config.sequence_length
        return min(self.config.batch_size, -(-self.step_tokens // (shortest * self.processes)))

    @property
    def accumulates(self) -> bool:
        """Whether a process runs several micro-batches in a step of full rows."""
        return self.step_tokens > self.config.batch_size * self.config.sequence_length * self.processes

    def packing(self, teacher: LayerwiseModel) -> Packing:
        """How documents become rows: as is wanted, but one a row if the model cannot keep them apart."""
        wanted = self.config.packing
        return "none" if wanted == "bfd" and not teacher.runs_packed else wanted

    # What trains

    def parameters(self, student: Student) -> list[str]:
        """Names of the parameters that train.

        Raises:
            InputError: `distill.train` selects none.
        """
        config = self.config
        return parameters_to_train(
            student, config.train, radius=config.radius, norm=config.train_norm, head=config.train_head
        )

    def layers(self, kept_layers: KeptLayers) -> Collection[int] | None:
        """Teacher indices of the layers that `distill.train` names; None where it names parameters instead."""
        return layers_to_train(kept_layers, self.config.train, self.config.radius)

    def averages(self, step: int) -> bool:
        """Whether the weights after a step (counted from 1) are part of the mean that the student gets."""
        share = self.config.average_last
        return share > 0 and step > self.steps() - max(1, round(share * self.steps()))

    # The optimizer

    @property
    def optimizer_name(self) -> str:
        """Of what keeps state for each parameter."""
        return f"{self.config.optimizer}{' and AdamW' * takes_only_matrices(optimizer_class(self.config))}"

    def optimizers(
        self, parameters: Sequence[nn.Parameter], in_layer: Sequence[bool], *, rate: float, steps: int, done: int = 0
    ) -> ScheduledOptimizers:
        """The optimizers of these parameters; their learning rate rises to its peak, then goes on as the config says.

        Args:
            in_layer: whether each parameter is of a layer.
            rate: the peak learning rate.
            steps: of the schedule.
            done: how many of them were made before.

        Raises:
            InputError: there is no such optimizer, or it does not take its options.
        """
        warmup = min(self.config.warmup_steps, steps // 2)
        optimizers = make_optimizers(self.config, parameters, in_layer, rate)
        schedules = [_schedule(self.config, each, warmup, steps, done) for each in optimizers]
        return ScheduledOptimizers(optimizers, schedules)

    def optimizer_bytes(self, parameters: Sequence[Tensor], in_layer: Sequence[bool]) -> int:
        """Bytes of optimizer state for these parameters, which may be on the meta device."""
        return total_state_bytes(self.config, parameters, in_layer)

    @property
    def update_bytes(self) -> float:
        """Bytes that a step reads and writes for a number of a layer's matrices: weight, gradient, optimizer state."""
        return 3 * MASTER_DTYPE.itemsize + 2 * state_bytes(self.config)

    def check(self, device: torch.device | str = "cpu") -> None:
        """Tries the optimizer on a small parameter, and whether its state can be saved.

        Raises:
            InputError: it says what will not do.
        """
        optimizer = try_optimizer(self.config, device=device)
        (parameter,) = optimizer.param_groups[0]["params"]
        collect([optimizer], {"weight": parameter})
