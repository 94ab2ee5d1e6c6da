"""What a batch may take, and what is left of it when memory runs out."""

from __future__ import annotations

import pytest
import torch

from layerpeel.inference.budget import Budget
from layerpeel.inference.layerwise import LayerwiseModel
from tests.families import tiny_model


def test_running_out_halves_the_budget_and_leaves_the_model_as_it_is() -> None:
    layerwise = LayerwiseModel(tiny_model("llama"))
    defaults = (layerwise.tokens_per_call, layerwise.logit_rows_at_a_time)
    budget = Budget(2**20, torch.device("cpu"))
    tokens = budget.tokens(layerwise, 4)
    assert budget.tokens_per_call is None and budget.logit_rows(layerwise, 4) == defaults[1] // 4
    budget.shrink(torch.cuda.OutOfMemoryError("CUDA out of memory."), layerwise, 4, row=8)
    assert (budget.bytes, budget.halved, budget.tokens(layerwise, 4)) == (2**19, 1, tokens // 2)
    assert budget.tokens_per_call == min(defaults[0], 4 * tokens) // 2
    assert budget.logit_rows(layerwise, 4) == defaults[1] // 2 // 4
    assert (layerwise.tokens_per_call, layerwise.logit_rows_at_a_time) == defaults


def test_other_errors_are_raised() -> None:
    layerwise, budget = LayerwiseModel(tiny_model("llama")), Budget(2**20, torch.device("cpu"))
    with pytest.raises(ValueError, match="another mistake"):
        budget.shrink(ValueError("another mistake"), layerwise, 4, row=8)
    assert budget.halved == 0


def test_what_torch_keeps_of_a_gpus_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"mem_get_info": (2 * 2**30, 80 * 2**30), "memory_reserved": 70 * 2**30, "memory_allocated": 8 * 2**30}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert Budget(None, torch.device("cuda", 0)).bytes == 2**35  # half of 64 GiB
    assert Budget(None, torch.device("cpu")).bytes == 2**30
