"""Which parameters train."""

from __future__ import annotations

import re

from layerpeel.errors import InputError
from layerpeel.training.student import Student


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
    depth, here = student.kept_layers, student.parameters()
    sets = {"neighbours": depth.neighbours(radius), "above": depth.above(), "all": depth.kept}
    if train in sets:
        chosen = {name for name in here if student.layer_of(name) in sets[train]}
    else:
        chosen = {name for name in here if train == "everything" or re.search(train, name)}
    if not chosen:
        raise InputError(
            f"distill.train: {train!r} selects no parameter of the student",
            hint="use neighbours, above, all, everything, or a pattern that matches names such as "
            f"{next(name for name in here if student.layer_of(name) is not None)}",
        )
    also = [
        module for module, on in ((student.layerwise.norm_module, norm), (student.layerwise.head_module, head)) if on
    ]
    wanted = {id(parameter) for module in also for parameter in module.parameters()}
    return [name for name, parameter in here.items() if name in chosen or id(parameter) in wanted]
