"""Runs a layer and reads what enters one of its projections, and the hidden states after it.

Shapes: R rows, T tokens, D hidden, I what enters a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.inference.residual_writers import Writer, Writers
from layerpeel.model.layer_inputs import first_tensor


class _StopError(Exception):
    """What comes later in the layer is not needed."""


@dataclass
class WrittenStates:
    """What a layer made of some rows.

    Attributes:
        after: [R, T, D] in fp32, the hidden states after a writer.
        inputs: [R, T, I], what enters its projection.
        given: [R, T, D], what the projection gives.
        output: [R, T, D], of the layer; None if it was left before its end.
    """

    after: Tensor
    inputs: Tensor
    given: Tensor
    output: Tensor | None = None


@torch.no_grad()
def read_writer(
    layer: nn.Module,
    writers: Writers,
    writer: Writer,
    hidden: Tensor,
    run: Callable[[Tensor], Tensor],
    *,
    to_end: bool,
) -> WrittenStates:
    """Runs a layer on hidden states [R, T, D].

    Args:
        writer: one of `writers` with a projection.
        run: runs the layer.
        to_end: whether the layer's output is wanted; else it is left after the writer.
    """
    assert writer.projection
    states = WrittenStates(writers.share * hidden.float(), hidden[:0], hidden[:0])

    def note_projection(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        states.inputs, states.given = args[0].view(*hidden.shape[:2], -1), output.view_as(hidden)

    def note_writer(scale: float, last: bool, output: Any) -> None:
        states.after += scale * first_tensor(output).view_as(hidden).float()
        if last and not to_end:
            raise _StopError

    with ExitStack() as hooks:
        projection = layer.get_submodule(writer.projection.name)
        hooks.callback(projection.register_forward_hook(note_projection).remove)
        for each in writers.summed(writer):
            hook = lambda _, __, output, each=each: note_writer(each.scale, each is writer, output)  # noqa: E731
            hooks.callback(layer.get_submodule(each.name).register_forward_hook(hook).remove)
        with suppress(_StopError):
            states.output = run(hidden)
    return states


@contextmanager
def inputs_of(layer: nn.Module, writer: Writer | None) -> Iterator[list[Tensor]]:
    """While the context lasts, what enters a writer's projection is noted, call by call; nothing if there is none."""
    noted: list[Tensor] = []
    if not writer:
        yield noted
        return
    assert writer.projection
    module = layer.get_submodule(writer.projection.name)
    handle = module.register_forward_pre_hook(lambda _, args: noted.append(args[0]))
    try:
        yield noted
    finally:
        handle.remove()
