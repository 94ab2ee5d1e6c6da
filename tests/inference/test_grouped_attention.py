"""Attention of one new token with grouped queries: what transformers' own gives, and only where it may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerpeel.inference import grouped_attention
from layerpeel.inference.decoding import plain_generation
from layerpeel.inference.grouped_attention import grouped_queries, grouped_sdpa
from tests.families import tiny_ids, tiny_model


def attention(groups: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True  # type: ignore[assignment]
    return module


def inputs(length: int, heads: int = 6, keyed: int = 2, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, heads, length, 8), torch.randn(3, keyed, tokens, 8), torch.randn(3, keyed, tokens, 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_new_token_attends_as_in_transformers(masked: bool, scaling: float | None, dtype: torch.dtype) -> None:
    query, key, value = (each.to(dtype) for each in inputs(1))
    mask = (torch.arange(11) >= torch.tensor([0, 4, 10])[:, None])[:, None, None] if masked else None
    expected, _ = sdpa_attention_forward(attention(3), query, key, value, mask, scaling=scaling)
    attended, weights = grouped_sdpa(attention(3), query, key, value, mask, scaling=scaling)
    assert weights is None and attended.shape == expected.shape == (3, 1, 6, 8)
    assert_close(attended, expected)


@pytest.mark.parametrize(
    ("length", "heads", "keyed", "options"),
    [(4, 6, 2, {}), (1, 6, 6, {}), (1, 6, 2, {"position_bias": torch.ones(3, 6, 1, 11)})],
)
def test_all_else_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, length: int, heads: int, keyed: int, options: dict[str, Tensor]
) -> None:
    calls = []
    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", lambda *a, **k: calls.append(k) or ("out", None))
    assert grouped_sdpa(attention(heads // keyed), *inputs(length, heads, keyed), None, **options) == ("out", None)
    assert [call.get("position_bias") is not None for call in calls] == [bool(options)]


def test_generation_uses_it_and_leaves_things_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_ids(2, 5)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    lengths: list[int] = []

    def counted(module: nn.Module, query: Tensor, *rest: object, **options: object) -> object:
        lengths.append(query.shape[2])
        return grouped_sdpa(module, query, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(grouped_attention, "grouped_sdpa", counted)
    with plain_generation(model):
        assert torch.equal(model.generate(ids, **options), expected)
    layers = model.config.num_hidden_layers
    assert lengths == [5] * layers + [1] * layers * 5
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_an_error_leaves_things_as_they_were() -> None:
    with pytest.raises(ZeroDivisionError), grouped_queries():
        1 / 0  # noqa: B018
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_an_attention_of_someone_elses_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_user() -> None: ...

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", of_the_user)
    with grouped_queries():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is of_the_user
