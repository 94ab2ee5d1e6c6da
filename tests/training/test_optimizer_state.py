"""An optimizer's state through a file: whatever it holds, however its parameters are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerpeel.errors import InputError
from layerpeel.training.optimizer_state import collect, restore
from layerpeel.training.state_files import SavedTensor, open_parts, write_parts


class KeepsAll(Optimizer):
    """An optimizer whose steps depend on state of every kind: numbers, text, nested, of other dtypes and shapes."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["updates"] += 1
            self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["count"], state["mode"], state["mean"] = 0, "slow", 0.0
                    state["nested"] = {"coarse": torch.zeros_like(parameter, dtype=torch.bfloat16), 7: [(1, 2.5), None]}
                    state["sign"] = torch.zeros_like(parameter, dtype=torch.int8)
                    state["exact"] = torch.zeros((), dtype=torch.float64)
                state["count"] += 1
                state["mode"] = "fast" if state["count"] > 5 else "slow"
                state["mean"] = 0.9 * state["mean"] + float(parameter.grad.mean())
                state["exact"] += parameter.grad.double().sum() * 1e-3
                state["nested"]["coarse"].mul_(group["betas"][0]).add_(parameter.grad)
                state["nested"][7][0] = (state["nested"][7][0][0] + 1, state["nested"][7][0][1])
                state["sign"] = parameter.grad.sign().to(torch.int8) - state["sign"] // 2
                size = group["lr"] * (2.0 if state["mode"] == "fast" else 1.0) / state["nested"][7][0][0] ** 0.5
                move = state["nested"]["coarse"].float() + state["sign"] + state["mean"] + state["exact"].float()
                parameter.sub_(size * move / (1 + group["updates"] / self.state["all"]["steps"]))


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make_steps(optimizer: Optimizer, named: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in named.items():
            parameter.grad = None if name == "c" else torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def through_a_file(path: Path, tensors: dict[str, Tensor], described: Any) -> tuple[dict[str, SavedTensor], Any]:
    write_parts(path, tensors, json.dumps(described))
    saved, text = open_parts([path])
    return saved, json.loads(text)


@pytest.mark.parametrize(
    "make",
    [
        KeepsAll,
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        torch.optim.Adafactor,
        torch.optim.ASGD,
    ],
    ids=["all kinds", "AdamW", "AMSGrad", "Adafactor", "ASGD"],
)
@pytest.mark.parametrize("order", ["abc", "cba"])
def test_what_comes_back_goes_on_as_before(tmp_path: Path, make: Any, order: str) -> None:
    before, after = parameters(), parameters()
    optimizer = make([before["a"], before["b"], before["c"]])
    make_steps(optimizer, before, range(4))
    tensors, described = through_a_file(tmp_path / "state", *collect([optimizer], before))
    with torch.no_grad():
        for name, parameter in after.items():
            parameter.copy_(before[name])
    other = make([after[name] for name in order])
    restore([other], after, tensors, described)
    for name, parameter in before.items():
        assert_same(dict(optimizer.state.get(parameter, {})), dict(other.state.get(after[name], {})))
    make_steps(optimizer, before, range(4, 9))
    make_steps(other, after, range(4, 9))
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]), name


def assert_same(one: Any, other: Any) -> None:
    """The same values, of the same types and dtypes."""
    if isinstance(one, Tensor):
        assert one.dtype is other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert type(one) is type(other) and one == other


def test_options_of_groups_come_back_whatever_the_groups(tmp_path: Path) -> None:
    before, after = parameters(), parameters()
    optimizer = KeepsAll([{"params": [before["b"]], "lr": 0.5}, {"params": [before["a"], before["c"]]}])
    make_steps(optimizer, before, range(3))
    other = KeepsAll([after["a"], after["c"], after["b"]])
    restore([other], after, *through_a_file(tmp_path / "state", *collect([optimizer], before)))
    (group,) = other.param_groups
    assert (group["lr"], group["betas"], group["updates"]) == (1e-3, (0.9, 0.99), 3)
    assert other.state[after["b"]]["count"] == 3 and other.state["all"] == {"steps": 6}


def test_what_cannot_be_saved_is_named() -> None:
    named = parameters()
    optimizer = KeepsAll([named["a"]])
    optimizer.state[named["a"]]["when"] = object()
    with pytest.raises(InputError, match=r"distill\.optimizer: it keeps a object, which cannot be saved"):
        collect([optimizer], named)
