"""What can be found wrong with a run once its teacher is loaded, before anything is computed."""

from __future__ import annotations

from layerpeel.config.distill import DistillConfig
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.architecture import count_parameters, find_architecture
from layerpeel.run.preflight import removable
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.student import Student


def check_trained(student: Student, config: DistillConfig) -> None:
    """Checks that a pattern in `train`, of the rounds or of the training at the end, names something.

    Raises:
        InputError: it does not.
    """
    for each in (config.in_rounds(), config.at_end(1)):
        if each and each.tokens_per_round and each.train not in ("neighbours", "above"):  # those need a gap
            TrainingRecipe(each).parameters(student)


def check_size(student: Student, config: RunConfig) -> None:
    """Checks that a whole student is larger than `stop.max_params`, and that removing layers can make it as small.

    Raises:
        InputError: it is not, or they cannot.
    """
    limit, total = config.stop.max_params, count_parameters(student.model)
    if limit is None:
        return
    if limit >= total:
        raise InputError(
            f"stop.max_params: {limit:,} is not below the teacher's {total:,} parameters",
            hint="lower it, or give stop.target_layers in its place",
        )
    layers = find_architecture(student.model).layers
    sizes = sorted(count_parameters(layers[layer]) for layer in removable(student.kept_layers, config))
    least = total - sum(sizes[-(len(layers) - 1) :])  # one layer stays
    if limit < least and config.stop.target_layers is None:
        raise InputError(
            f"stop.max_params: {limit:,} cannot be reached: without any layer that may go, {least:,} parameters stay",
            hint="raise it, or protect fewer layers (score.protect)",
        )
