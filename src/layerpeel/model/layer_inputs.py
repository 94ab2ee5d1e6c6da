"""Records the arguments that a base model passes to its layers, and the form of output that it expects of them.

The base model's forward runs with every layer's forward replaced by a recorder, so that no family needs extra code.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.errors import InputError
from layerpeel.model.architecture import Architecture
from layerpeel.processes.memory import memory_is_full

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")  # names of the KV cache among a layer's arguments
LayerInputs = tuple[tuple[Any, ...], dict[str, Any]]
# Forms of a layer's output: hidden states, or a tuple of them and one or two other values.
OUTPUT_FORMS: tuple[Callable[[Tensor, Any], Any], ...] = (
    lambda hidden, _: hidden,
    lambda hidden, _: (hidden,),
    lambda hidden, other: (hidden, other),
    lambda hidden, other: (hidden, other, other),
)
OTHER_OUTPUT = object()


class _UnsupportedForwardError(Exception):
    """The base model's forward does more than pass hidden states from layer to layer."""


def refuses_input(error: Exception) -> bool:
    """Whether an error may come of a model's code that does not take an argument or its shape.

    An error of the device, such as one of memory, of another device's tensors or of a kernel, says nothing about that.
    """
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return not memory_is_full(error) and bool(re.search("size|shape|dimension|expand", str(error)))
    return isinstance(error, TypeError | ValueError | IndexError | AttributeError | NotImplementedError)


class LayerInputRecorder:
    """Records the arguments that a base model passes to its layers, without running the layers.

    Attributes:
        form: makes a layer's output, in the form that the base model expects, from hidden states.
        rows: by an argument's path and number of dimensions, the rows of its first dimension for each row of the
            batch; 0 if that dimension does not follow the batch.
        vocabulary: tokens that have an embedding.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Tries each output form on a small batch.

        Raises:
            InputError: the base model's forward does more than pass hidden states through its layers and final norm.
        """
        self._architecture = architecture
        self.vocabulary = architecture.base.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        reason = "its forward calls them in some other way"
        for form in OUTPUT_FORMS:
            self.form = form
            try:
                of_two, of_three = self._try(2), self._try(3)
            except _UnsupportedForwardError as error:
                reason = str(error)
                continue
            except Exception as error:  # the base model expects another form
                if not refuses_input(error):
                    raise
                continue
            self.rows = _rows_per_row(of_two, of_three)
            return
        raise InputError(
            f"{type(architecture.base).__name__} cannot be run layer by layer: {reason}",
            hint="`layerpeel families` lists the families that can",
        )

    def record(self, inputs: dict[str, Any]) -> tuple[Tensor, list[LayerInputs]]:
        """The first layer's hidden states [B, T, D], and each layer's other arguments."""
        hidden_states: list[Tensor] = []
        arguments: list[LayerInputs] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split_hidden(args, kwargs)
            hidden_states.append(hidden)
            arguments.append((args, kwargs))
            return self.form(hidden, None)

        with ExitStack() as patches:
            for layer in self._architecture.layers:
                patches.enter_context(replaced_forward(layer, stand_in))
            patches.enter_context(replaced_forward(self._architecture.norm, lambda hidden: hidden))
            self._architecture.base(**inputs, use_cache=False)
        return hidden_states[0], arguments

    @torch.no_grad()
    def _try(self, batch: int) -> list[LayerInputs]:
        """Records with layers that add 1, and checks that each receives the previous one's output."""
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
            if order and not _equal(hidden, last):
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
            if hidden.shape != last.shape or not _equal(hidden, last):
                raise _UnsupportedForwardError("it changes the hidden states between the last layer and the final norm")
            return hidden

        ids = torch.arange(batch * 5).view(batch, 5) % min(8, self.vocabulary - 1) + 1
        with ExitStack() as patches:
            for position, layer in enumerate(architecture.layers):
                patches.enter_context(replaced_forward(layer, _at(position, stand_in)))
            patches.enter_context(replaced_forward(architecture.norm, norm))
            out = architecture.base(input_ids=ids.to(architecture.device), use_cache=False)[0]
        if order != list(range(len(architecture.layers))):
            raise _UnsupportedForwardError(f"it runs its layers in the order {', '.join(map(str, order[:12]))}")
        if out.shape != last.shape or not _equal(out, last):
            raise _UnsupportedForwardError("it changes the hidden states after the final norm")
        return arguments


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same; NaN, which a token's embedding may be, is like NaN."""
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def take_rows(value: Any, rows: Tensor, batch: int, per_row: dict[tuple[Any, ...], int], path: tuple[Any, ...]) -> Any:
    """Selects rows of the batch from a layer's recorded arguments.

    Args:
        value: arguments, or a part of them.
        rows: indices into the batch.
        batch: number of rows that the arguments were recorded for.
        per_row: `LayerInputRecorder.rows`. A tensor that is not in it has one row for each of the batch if its first
            dimension is `batch`, and none otherwise.
        path: of `value` in the arguments.
    """
    if isinstance(value, Tensor):
        default = int(batch > 1 and value.dim() > 1 and value.shape[0] == batch)  # a leading 1 broadcasts
        count = per_row.get((path, value.dim()), default)
        return value.unflatten(0, (batch, count))[rows].flatten(0, 1) if count else value
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(v, rows, batch, per_row, (*path, n)) for n, v in enumerate(value))
    if isinstance(value, dict):
        return {n: take_rows(v, rows, batch, per_row, (*path, n)) for n, v in value.items()}
    return value


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward of `module` while the context lasts."""
    overridden = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if overridden is None:
            del module.forward
        else:
            module.forward = overridden  # type: ignore[method-assign]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The leaves of nested tuples, lists and dicts, each with its path of indices and keys."""
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


def _rows_per_row(of_two: list[LayerInputs], of_three: list[LayerInputs]) -> dict[tuple[Any, ...], int]:
    """For each tensor argument, by how much its first dimension grows with the batch, from batches of 2 and 3 rows.

    A first dimension of 1 is left out: it may broadcast.
    """
    growth: dict[tuple[Any, ...], int] = {}
    for smaller, larger in zip(of_two, of_three, strict=True):
        counterparts = dict(leaves(larger))
        for path, value in leaves(smaller):
            other = counterparts.get(path)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.dim() and value.shape[0] > 1:
                growth[path, value.dim()] = max(0, other.shape[0] - value.shape[0])
    return growth
