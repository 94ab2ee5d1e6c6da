"""How a model's own forward calls its layers: with which arguments, and what it expects back.

Its forward runs with every layer standing in as a recorder, so that no family needs code of its own.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.errors import InputError
from layerpeel.model.architecture import Architecture

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")  # what forwards call the cache that they hand to a layer
LayerInputs = tuple[tuple[Any, ...], dict[str, Any]]
# What forwards expect of a layer: hidden states, or a tuple of them and something else.
OUTPUT_FORMS: tuple[Callable[[Tensor, Any], Any], ...] = (
    lambda hidden, _: hidden,
    lambda hidden, _: (hidden,),
    lambda hidden, other: (hidden, other),
    lambda hidden, other: (hidden, other, other),
)
OTHER_OUTPUT = object()


class _UnsupportedForwardError(Exception):
    """A forward that does not hand hidden states from layer to layer."""


class LayerInputRecorder:
    """Records the calls that a base model makes to its layers, without running them.

    Attributes:
        form: makes of hidden states what the base model expects of a layer.
        rows: rows that an argument has for each row of the batch, by the argument's path; 0 if it has none.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Tries the forms of output on a few tokens.

        Raises:
            InputError: the base model does not hand hidden states from layer to layer to norm, and out.
        """
        self._architecture = architecture
        reason = "its forward calls them in some other way"
        for form in OUTPUT_FORMS:
            self.form = form
            try:
                two, three = self._try(2), self._try(3)
            except _UnsupportedForwardError as error:
                reason = str(error)
                continue
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # not the form that it expects
                continue
            self.rows = _rows_per_row(two, three)
            return
        raise InputError(
            f"{type(architecture.base).__name__} cannot be run layer by layer: {reason}",
            hint="`layerpeel families` lists the families that can",
        )

    def record(self, inputs: dict[str, Any]) -> tuple[Tensor, list[LayerInputs]]:
        """What enters the first layer [B, T, D], and the other arguments of each layer."""
        seen: list[Tensor] = []
        arguments: list[LayerInputs] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split_hidden(args, kwargs)
            seen.append(hidden)
            arguments.append((args, kwargs))
            return self.form(hidden, None)

        with ExitStack() as patches:
            for layer in self._architecture.layers:
                patches.enter_context(replaced_forward(layer, stand_in))
            patches.enter_context(replaced_forward(self._architecture.norm, lambda hidden: hidden))
            self._architecture.base(**inputs, use_cache=False)
        return seen[0], arguments

    @torch.no_grad()
    def _try(self, batch: int) -> list[LayerInputs]:
        """Records with layers that add 1, and checks that each gets what the one before it gave."""
        architecture = self._architecture
        order: list[int] = []
        arguments: list[LayerInputs] = []
        last = torch.empty(0)

        def stand_in(position: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            hidden, args, kwargs = _split_hidden(args, kwargs)
            if hidden.shape[:-1] != (batch, 5):
                raise _UnsupportedForwardError(
                    f"its hidden states have shape {tuple(hidden.shape)} for {batch} x 5 tokens"
                )
            if order and not torch.equal(hidden, last):
                raise _UnsupportedForwardError(
                    f"it changes the hidden states between layers {order[-1]} and {position}"
                )
            if any(value is OTHER_OUTPUT for _, value in leaves((args, kwargs))):
                raise _UnsupportedForwardError("its layers hand each other more than hidden states")
            order.append(position)
            arguments.append((args, kwargs))
            last = hidden + 1
            return self.form(last, OTHER_OUTPUT)

        def norm(hidden: Tensor) -> Tensor:
            if hidden.shape != last.shape or not torch.equal(hidden, last):
                raise _UnsupportedForwardError("it changes the hidden states between the last layer and the final norm")
            return hidden

        ids = torch.arange(batch * 5).view(batch, 5) % 8 + 1
        with ExitStack() as patches:
            for position, layer in enumerate(architecture.layers):
                patches.enter_context(replaced_forward(layer, _at(position, stand_in)))
            patches.enter_context(replaced_forward(architecture.norm, norm))
            out = architecture.base(input_ids=ids.to(architecture.device), use_cache=False)[0]
        if order != list(range(len(architecture.layers))):
            raise _UnsupportedForwardError(f"it runs its layers in the order {', '.join(map(str, order[:12]))}")
        if out.shape != last.shape or not torch.equal(out, last):
            raise _UnsupportedForwardError("it changes the hidden states after the final norm")
        return arguments


def take_rows(value: Any, rows: Tensor, batch: int, per_row: dict[tuple[Any, ...], int], path: tuple[Any, ...]) -> Any:
    """A layer's arguments for these rows of the batch that they were recorded for.

    Args:
        per_row: `LayerInputRecorder.rows`; what it does not know counts as one row each if there are as many as in
            the batch.
        path: where `value` is among the arguments.
    """
    if isinstance(value, Tensor):
        unknown = int(batch > 1 and value.dim() > 1 and value.shape[0] == batch)  # a leading 1 broadcasts
        each = per_row.get((path, value.dim()), unknown)
        return value.unflatten(0, (batch, each))[rows].flatten(0, 1) if each else value
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(v, rows, batch, per_row, (*path, n)) for n, v in enumerate(value))
    if isinstance(value, dict):
        return {n: take_rows(v, rows, batch, per_row, (*path, n)) for n, v in value.items()}
    return value


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets `module` run `forward` in place of its own, for the time of the context."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: some families return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What is in nested tuples, lists and dicts, each with its path."""
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    else:
        yield path, value


def _at(position: int, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: stand_in(position, *args, **kwargs)


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), rest


def _rows_per_row(two: list[LayerInputs], three: list[LayerInputs]) -> dict[tuple[Any, ...], int]:
    """For each tensor argument, how its first dimension follows the batch, from the calls for two rows and for three.

    A first dimension of 1 says nothing: it may be that of one row for all.
    """
    found: dict[tuple[Any, ...], int] = {}
    for few, more in zip(two, three, strict=True):
        longer = dict(leaves(more))
        for path, value in leaves(few):
            other = longer.get(path)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.dim() and value.shape[0] > 1:
                found[path, value.dim()] = max(0, other.shape[0] - value.shape[0])
    return found
