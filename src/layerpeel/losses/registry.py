"""The table of losses, by the names that a config uses."""

from __future__ import annotations

from pydantic import ValidationError

from layerpeel.config.distill import LossConfig
from layerpeel.config.reading import describe
from layerpeel.errors import InputError, resolve_class
from layerpeel.losses.base import Loss
from layerpeel.losses.cross_entropy import CrossEntropy
from layerpeel.losses.hidden_cosine import HiddenCosine
from layerpeel.losses.hidden_mse import HiddenMSE
from layerpeel.losses.jensen_shannon import JensenShannon
from layerpeel.losses.kl import KL
from layerpeel.losses.reverse_kl import ReverseKL

LOSSES: dict[str, type[Loss]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "cross_entropy": CrossEntropy,
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
}


def make_loss(name: str, config: LossConfig) -> Loss:
    """Creates a loss from its name in `LOSSES`, or from a user's `module:Class`, with the options in its config.

    Raises:
        InputError: the name or an option is unknown, or an option's value is wrong.
    """
    loss = resolve_class(name, LOSSES, "loss", Loss)
    try:
        return loss.model_validate(config.model_extra or {})
    except ValidationError as error:
        raise InputError(
            describe(error, loss, f"distill.losses.{name}"),
            hint=f"options of {name}: weight, {', '.join(loss.model_fields)}",
        ) from None
