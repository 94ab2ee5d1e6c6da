"""What layers add to their hidden states, over the families, beside what their modules really give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.residual_writers import UnknownWritersError, Writers, find_writers
from layerpeel.inference.written_states import read_writer
from tests.families import tiny_ids, tiny_model

# The projections of a layer, and what else adds to its hidden states.
SEQUENTIAL = ("self_attn.o_proj", "mlp.down_proj")
PROJECTIONS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "cohere2", "granite"], SEQUENTIAL),
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2"], SEQUENTIAL),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "mixtral": ("self_attn.o_proj", None),
    "mamba2": (None, "mixer.out_proj"),
}
NORMED = {"gemma2", "gemma3_text", "olmo2"}


def writers_of(family: str, index: int = 1, dtype: torch.dtype = torch.float32, **changes: object) -> Writers:
    layerwise = LayerwiseModel(tiny_model(family, **changes).to(dtype))
    hidden, arguments = layerwise.begin(tiny_ids(2, 9))
    with torch.no_grad():
        return find_writers(layerwise.layers[index], hidden, lambda: layerwise.layer(index, hidden, arguments[index]))


@pytest.mark.parametrize("family", PROJECTIONS)
def test_the_projections_of_a_family(family: str) -> None:
    writers = writers_of(family)
    found_names = tuple(
        each.projection.name if each and each.projection else None for each in (writers.first, writers.last)
    )
    assert found_names == PROJECTIONS[family]
    for each in (writers.first, writers.last):
        assert not each or not each.projection or (each.projection.gains is not None) == (family in NORMED)


def test_bfloat16_shows_the_same() -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        low = writers_of(family, dtype=torch.bfloat16)
        assert [each.name for each in low.writers] == [each.name for each in writers_of(family).writers]


def test_a_multiplier_is_measured() -> None:
    writers = writers_of("granite", residual_multiplier=0.22)
    assert [each.scale for each in writers.writers] == pytest.approx([0.22, 0.22], rel=1e-5)


def test_a_norm_has_its_gains() -> None:
    model = tiny_model("olmo2")
    writers = writers_of("olmo2")
    assert writers.last and writers.last.projection and writers.last.projection.gains is not None
    weight = model.model.layers[1].post_feedforward_layernorm.weight
    torch.testing.assert_close(writers.last.projection.gains, weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "falcon", "mixtral", "granite"])
def test_the_hidden_states_after_attention_are_those_of_the_layer_with_a_silent_mlp(family: str) -> None:
    """Written another way: what remains of the layer's output if all after attention gives zeros."""
    layerwise = LayerwiseModel(tiny_model(family))
    hidden, arguments = layerwise.begin(tiny_ids(2, 9))
    layer = layerwise.layers[1]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return layerwise.layer(1, hidden, arguments[1])

    with torch.no_grad():
        writers = find_writers(layer, hidden, lambda: run(hidden))
        assert writers.first
        states = read_writer(layer, writers, writers.first, hidden, run, to_end=False)
        late = next(name for name in ("mlp", "feed_forward") if hasattr(layer, name))
        norm = getattr(layer, "post_feedforward_layernorm", None)
        silent = norm if norm is not None else getattr(layer, late)
        hook = silent.register_forward_hook(
            lambda _, __, output: (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output
        )
        expected = run(hidden)
        hook.remove()
    assert states.output is None
    torch.testing.assert_close(states.after, expected, rtol=1e-4, atol=1e-4)


class Gated(nn.Module):
    """A layer that multiplies, and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.gate(hidden)


def test_a_layer_that_does_not_add_is_not_taken_for_one_that_does() -> None:
    hidden, layer = torch.randn(2, 5, 8), Gated()
    with pytest.raises(UnknownWritersError):
        find_writers(layer, hidden, lambda: layer(hidden))
