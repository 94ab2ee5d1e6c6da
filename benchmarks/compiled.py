"""What torch.compile gains in a step of distillation: a decoder layer, forward and both ways, and the KL of logits.

    python benchmarks/compiled.py --shapes smollm2-135m,qwen-vocabulary --out benchmarks/results/compiled.json
    python benchmarks/compiled.py --shapes qwen2.5-3b --out compiled.json        # on a GPU

Random weights of a shape of `distillation.py`, bfloat16. A layer that is frozen runs forward; one that trains, in fp32
under autocast, both ways; the KL is that of `losses/kl.py` with its gradient, on as many rows as there are at a time.
Each part runs as it is and compiled, in turn; written are the ratio of the medians (above 1: compiled is faster), what
compiling takes, and the largest difference of the results over the largest of their values.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from distillation import SHAPES, Shape, make_teacher
from healing import names_among
from machine import machine
from measuring import finish
from torch import Tensor

from layerpeel.inference.layerwise import LayerwiseModel, run_layer
from layerpeel.losses.kl import KL
from layerpeel.losses.logits import BYTES_IN_CACHE
from layerpeel.model.devices import synchronize
from layerpeel.training.recipe import autocast

Part = Callable[[], Tensor]


def main() -> None:
    """Times each part, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names_among("shape", SHAPES), required=True, help=", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {
        shape: {
            name: compared(*both, options.repeats, device) for name, both in parts_of(SHAPES[shape], device).items()
        }
        for shape in options.shapes
    }
    command = f"python benchmarks/compiled.py --shapes {','.join(options.shapes)}"
    finish(options.out, {"command": command, "machine": machine(), "shapes": shapes})


def parts_of(shape: Shape, device: torch.device) -> dict[str, tuple[Part, Part]]:
    """Each part as it is, and compiled."""
    model = make_teacher(replace(shape, layers=1), device).to(torch.bfloat16)
    layerwise = LayerwiseModel(model)
    ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.tokens), device=device)
    hidden, (arguments,) = layerwise.begin(ids)
    frozen, trained = layerwise.layers[0], copy.deepcopy(layerwise.layers[0]).float().requires_grad_(True)

    def forward(layer: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return run_layer(layer, hidden, arguments)

    def both_ways(layer: torch.nn.Module) -> Tensor:
        entered = hidden.detach().requires_grad_()
        with autocast(device.type, torch.bfloat16):
            run_layer(layer, entered, arguments).float().square().mean().backward()
        assert entered.grad is not None
        return entered.grad

    rows = BYTES_IN_CACHE // (4 * shape.vocabulary) if device.type == "cpu" else layerwise.logit_rows(2)
    logits, labels = torch.randn(2, max(1, rows), shape.vocabulary, device=device), ids.flatten()[:1]
    compiled_kl = torch.compile(lambda student, teacher: KL().value_and_grad(student, teacher, labels)[1])

    def kl(compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return compute(*logits.clone())

    def compiled(layer: torch.nn.Module) -> torch.nn.Module:
        layer = copy.deepcopy(layer)
        layer.compile()
        return layer

    fast_frozen, fast_trained = compiled(frozen), compiled(trained)
    return {
        "layer, forward": (lambda: forward(frozen), lambda: forward(fast_frozen)),
        "layer, both ways": (lambda: both_ways(trained), lambda: both_ways(fast_trained)),
        "KL and its gradient": (
            lambda: kl(lambda student, teacher: KL().value_and_grad(student, teacher, labels)[1]),
            lambda: kl(compiled_kl),
        ),
    }


def compared(plain: Part, compiled: Part, repeats: int, device: torch.device) -> dict[str, float]:
    """Times both in turn."""

    def seconds(part: Part) -> float:
        synchronize(device)
        started = time.perf_counter()
        part()
        synchronize(device)
        return time.perf_counter() - started

    first = seconds(compiled)
    expected, result = plain(), compiled()
    difference = (expected - result).abs().max() / expected.abs().max()
    pairs = [(seconds(plain), seconds(compiled)) for _ in range(repeats)]
    as_it_is, faster = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "speed": as_it_is / faster,
        "seconds": as_it_is,
        "seconds_to_compile": first,
        "difference": difference.item(),
    }


if __name__ == "__main__":
    main()
