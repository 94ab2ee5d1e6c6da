"""Which parameters train."""

from __future__ import annotations

import re
from collections.abc import Collection

from layerpeel.errors import InputError
from layerpeel.model.surgery import KeptLayers
from layerpeel.training.student import Student


def layers_to_train(kept_layers: KeptLayers, train: str, radius: int = 1) -> Collection[int] | None:
    """Teacher indices of the layers that a word names (see `parameters_to_train`); None if it is no such word."""
    sets = {"neighbours": kept_layers.neighbours(radius), "above": kept_layers.above(), "all": kept_layers.kept}
    return sets.get(train)


def parameters_to_train(
    student: Student, train: str, *, radius: int = 1, norm: bool = False, head: bool = False
) -> list[str]:
    """The names of the parameters that a round trains.

    Args:
        train: `neighbours` of every gap within `radius`, `above` the first gap, `all` layers, `everything` there is, or
            a regular expression that is searched in names such as `model.layers.7.mlp.up_proj.weight`.
        norm, head: the final norm, the head too. Where the head is tied to the embeddings, both are trained.

    Raises:
        InputError: nothing matches.
    """
    parameters, layers = student.parameters(), layers_to_train(student.kept_layers, train, radius)
    if layers is not None:
        chosen = {name for name in parameters if student.layer_of(name) in layers}
    else:
        chosen = {name for name in parameters if train == "everything" or re.search(train, name)}
    if not chosen:
        raise InputError(
            f"distill.train: {train!r} selects no parameter of the student",
            hint="use neighbours, above, all, everything, or a pattern that matches names such as "
            f"{next(name for name in parameters if student.layer_of(name) is not None)}",
        )
    modules = [student.layerwise.norm_module] * norm + [student.layerwise.head_module] * head
    also = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in parameters.items() if name in chosen or id(parameter) in also]
