"""Finds what a decoder layer adds to its hidden states, and by which projections, by trying it.

A *writer* is a module whose output goes into the layer's output times a constant, and no other way, where those after
it are silent: the output projections of attention and MLP, or the norms after them where a family has such. Nothing is
known of families here: each module's output is changed at random, and the layer's output must change by a multiple of
the same.

Shapes: B batch, T tokens, D hidden, I what enters a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerpeel.inference.layerwise import LayerwiseModel, run_layer
from layerpeel.model.layer_inputs import first_tensor

PROBE = (2, 9)  # rows and tokens on which a layer's projections are looked for
TOLERANCE = 0.02  # of a norm, by which bfloat16 may miss what is exact
LEAST_SCALE = 1e-3  # of a writer; what changes the output by less does not write

RunLayer = Callable[[], Tensor]
"""Runs a layer on some tokens, always the same: [B, T, D]."""


@dataclass(frozen=True)
class Projection:
    """A linear map in a layer, x W + b.

    Attributes:
        name: of its module in the layer.
        transposed: whether its weight is [I, D], not [D, I] as that of `nn.Linear`.
        gains: [D], what a norm after it multiplies each dimension by, once it has brought a token to mean square 1;
            None where no norm follows.
    """

    name: str
    transposed: bool
    gains: Tensor | None = None


@dataclass(frozen=True)
class Writer:
    """A module that adds to a layer's hidden states.

    Attributes:
        name: of the module in the layer.
        scale: the constant that its output is multiplied by.
        is_final: whether the rest of the layer does not react to it.
        projection: whose output it gives, as it is or normed; None if there is none.
    """

    name: str
    scale: float
    is_final: bool
    projection: Projection | None


@dataclass(frozen=True)
class Writers:
    """What a layer makes of its hidden states h: share * h, and scale * output of each writer that is in no other.

    Attributes:
        share: of h.
        writers: in the order in which they end.
    """

    share: float
    writers: tuple[Writer, ...]

    @property
    def last(self) -> Writer | None:
        """The last projection that the layer does not react to: that of its MLP, or of all it has."""
        return next((each for each in reversed(self.writers) if each.projection and each.is_final), None)

    @property
    def first(self) -> Writer | None:
        """The last projection before that: that of attention."""
        end = self.writers.index(self.last) if self.last else len(self.writers)
        return next((each for each in reversed(self.writers[:end]) if each.projection), None)

    def summed(self, until: Writer) -> tuple[Writer, ...]:
        """The writers whose outputs add up to the hidden states after one of them."""
        names = [each.name for each in self.writers]
        apart = [each for each in self.writers if not any(each.name.startswith(f"{name}.") for name in names)]
        return tuple(each for each in apart if self.writers.index(each) <= self.writers.index(until))


class UnknownWritersError(Exception):
    """A layer does something else to its hidden states than add to them."""


@torch.no_grad()
def find_layer_writers(layerwise: LayerwiseModel, layer: nn.Module, index: int) -> Writers | None:
    """What a layer adds to its hidden states; None if that cannot be told. The same in all processes.

    Args:
        layerwise: a model that such layers are of.
        index: of its layer whose arguments this one takes.
    """
    ids = torch.arange(PROBE[0] * PROBE[1]).view(PROBE) % layerwise.vocab_size
    hidden, arguments = layerwise.begin(ids)
    try:
        writers = find_writers(layer, hidden, lambda: run_layer(layer, hidden, arguments[index]))
    except UnknownWritersError:
        return None
    return writers if writers.first or writers.last else None


@torch.no_grad()
def find_writers(layer: nn.Module, hidden: Tensor, run: RunLayer) -> Writers:
    """Finds what a layer adds to its hidden states.

    Args:
        hidden: [B, T, D], some that it is given.
        run: runs it on them.

    Raises:
        UnknownWritersError: the layer's output is no sum of them and what modules of it give.
    """
    return _Search(layer, hidden, run).search()


class _Search:
    """The trials on one layer.

    Attributes:
        outputs: what each module gives, in the order in which they end: of those that run once, and give [B, T, D].
        inputs: the first argument of each.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor, run: RunLayer) -> None:
        self.hidden, self.run = hidden, run
        self.modules = {name: module for name, module in layer.named_modules() if name}
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        size = max(value.float().square().mean().sqrt() for value in (hidden, run()))  # not lost in rounding
        self.noise = (noise * size).to(hidden.dtype)
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Any] = {}
        self._record()

    def search(self) -> Writers:
        """Tries the modules from the last to the first, each with those silent that were found after it."""
        backwards = list(reversed(self.outputs))
        projections = [name for name in backwards if self._projection(name)]
        others = [name for name in backwards if name not in projections]
        scales: dict[str, float] = {}
        while True:
            if self._finds(projections, scales):
                continue
            if share := self._share(scales):
                break
            if not self._finds(others, scales):
                raise UnknownWritersError("a layer's output is no sum of its input and what modules in it give")
        writers = tuple(self._writer(name, scales[name]) for name in self.outputs if name in scales)
        return Writers(share, writers)

    def _finds(self, names: Iterable[str], scales: dict[str, float]) -> bool:
        """Notes the first of some modules that writes, once those that are in `scales` are silent."""
        with self._silent(scales):
            before = self.run().float()
            for name in names:
                if name not in scales and (scale := self._scale(name, before)):
                    scales[name] = scale
                    return True
        return False

    def _scale(self, name: str, before: Tensor) -> float | None:
        """By what a module's output is multiplied on its way to the layer's; None if it is not a constant.

        Args:
            before: the layer's output, as it is without a change.
        """
        with _changed(self.modules[name], lambda output: output + self.noise.view_as(output)):
            scale = _multiple(self.run().float() - before, self.noise.float())
        if scale is None or abs(scale) < LEAST_SCALE:
            return None
        return 1.0 if abs(scale - 1) < TOLERANCE else scale

    def _share(self, silent: Iterable[str]) -> float | None:
        """What is left of the input, once these are silent; None if that is no multiple of it."""
        with self._silent(silent):
            share = _multiple(self.run().float(), self.hidden.float())
        if share is None or abs(share) < LEAST_SCALE:
            return None
        return 1.0 if abs(share - 1) < TOLERANCE else share

    def _record(self) -> None:
        calls: dict[str, int] = {}
        shape = self.hidden.shape

        def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
            value = first_tensor(output)
            calls[name] = calls.get(name, 0) + 1
            if not isinstance(value, Tensor) or value.shape[-1:] != shape[-1:] or value.numel() != shape.numel():
                return
            given = next(iter(inputs), None)
            self.outputs[name] = value.clone()  # some are changed in place later
            self.inputs[name] = given.clone() if isinstance(given, Tensor) else None

        with ExitStack() as hooks:
            for name, module in self.modules.items():
                handle = module.register_forward_hook(lambda _, given, output, name=name: note(name, given, output))
                hooks.callback(handle.remove)
            self.run()
        self.outputs = {name: value for name, value in self.outputs.items() if calls[name] == 1}

    @contextmanager
    def _silent(self, names: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(_changed(self.modules[name], torch.zeros_like))
            yield

    def _writer(self, name: str, scale: float) -> Writer:
        final = self._scale(name, self.run().float()) is not None
        return Writer(name, scale, final, self._projection(name) or self._normed(name))

    def _projection(self, name: str) -> Projection | None:
        """The linear map that a module is, if it is one."""
        module, given, output = self.modules[name], self.inputs[name], self.outputs[name]
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not isinstance(given, Tensor):
            return None
        for matrix, transposed in ((weight.T, False), (weight, True)):
            if matrix.shape == (given.shape[-1], output.shape[-1]) and given.dtype == matrix.dtype:
                made = given @ matrix if bias is None else given @ matrix + bias
                if made.shape == output.shape and _close(made, output):
                    return Projection(name, transposed)
        return None

    def _normed(self, name: str) -> Projection | None:
        """The linear map whose output a norm is of, if the module is such a norm."""
        given = self.inputs[name]
        for each, output in self.outputs.items():
            if isinstance(given, Tensor) and given is not output and not torch.equal(given, output):
                continue
            projection, gains = self._projection(each), _gains(output.float(), self.outputs[name].float())
            if projection and gains is not None:
                return Projection(projection.name, projection.transposed, gains)
        return None


def _close(value: Tensor, to: Tensor) -> bool:
    return float((value.float() - to.float()).norm()) <= TOLERANCE * float(to.float().norm())


def _multiple(value: Tensor, of: Tensor) -> float | None:
    """The factor that makes a tensor of another; None if none does."""
    factor = float((value * of).sum() / of.square().sum())
    return factor if _close(factor * of, value) else None


def _gains(given: Tensor, output: Tensor) -> Tensor | None:
    """[D], what a norm by the root of the mean square multiplies each dimension by; None if it is no such norm."""
    unit = given / given.square().mean(-1, keepdim=True).sqrt()
    unit, output = unit.flatten(0, -2), output.flatten(0, -2)
    gains = (unit * output).sum(0) / unit.square().sum(0)
    return gains if _close(unit * gains, output) else None


@contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context lasts, what a module gives is changed."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        value = change(first_tensor(output))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
