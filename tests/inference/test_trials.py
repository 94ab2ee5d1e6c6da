"""What a model is tried for: equal but for its own noise, and a failing device is no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import refuses_input
from layerpeel.processes.progress import print_once
from tests.families import tiny_model

OFF = "texts that begin alike run one by one: in a tree, this model would give other numbers"


class Shaken(LayerwiseModel):
    """A model whose kernel for masks moves its hidden states, and that may ignore which tokens a mask hides."""

    def __init__(self, noise: float, *, obeys: bool = True) -> None:
        super().__init__(tiny_model("llama").to(torch.bfloat16))
        self.noise, self.obeys = noise, obeys

    def forward_with_skips(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks = {} if attention_mask is None or not self.obeys else {"attention_mask": attention_mask}
        hidden = super().forward_with_skips(*args, **kwargs, **masks)
        if attention_mask is None:
            return hidden
        shaking = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(len(hidden[0])))
        return hidden + (self.noise * shaking * hidden.float().norm() / shaking.norm()).to(hidden.dtype)


@pytest.mark.parametrize(
    ("noise", "obeys", "runs"),
    [(0.0, True, True), (0.03, True, True), (0.2, True, False), (0.0, False, False), (0.03, False, False)],
)
def test_trees_are_told_from_noise(noise: float, obeys: bool, runs: bool, capsys: pytest.CaptureFixture[str]) -> None:
    print_once.cache_clear()
    assert Shaken(noise, obeys=obeys).runs_trees is runs
    assert (OFF in capsys.readouterr().err) is not runs


def test_a_float32_model_is_held_to_rounding() -> None:
    layerwise = Shaken(1e-3)
    layerwise.model.float()
    layerwise.noise = 0.0
    assert layerwise.runs_trees and layerwise.runs_packed


ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("Expected all tensors to be on the same device, but found at least two devices"), False),
    (RuntimeError("NCCL error: unhandled system error"), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes of size 4"), False),
    (KeyError("weight"), False),
    (RuntimeError("The size of tensor a (32) must match the size of tensor b (4) at non-singleton dimension 4"), True),
    (ValueError("too many values to unpack (expected 2)"), True),
    (TypeError("forward() got an unexpected keyword argument 'position_ids'"), True),
    (NotImplementedError("no masks"), True),
]


@pytest.mark.parametrize(("error", "refuses"), ERRORS, ids=lambda value: str(value)[:20])
def test_errors_of_a_device_are_no_answer(error: Exception, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise error

    assert refuses_input(error) is refuses
    layerwise = LayerwiseModel(tiny_model("llama"))
    monkeypatch.setattr(layerwise, "forward_with_skips", fail)
    for switch in ("runs_trees", "runs_packed"):
        if refuses:
            assert not getattr(layerwise, switch)
        else:
            with pytest.raises(type(error)):
                getattr(layerwise, switch)
