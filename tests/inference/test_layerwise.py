"""One pass over the layers gives what removing and running gives, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from layerpeel.data.rows import positions_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.surgery import remove_layers
from tests.families import FAMILIES, LAYERS, UNLISTED, tiny_ids, tiny_model

EVERY = [*FAMILIES, *UNLISTED]


@pytest.mark.parametrize("family", EVERY)
def test_one_pass_is_removing_and_running(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    layerwise, candidates = LayerwiseModel(model), range(LAYERS)
    branches = layerwise.forward_with_skips(ids, candidates)
    with torch.no_grad():
        full = model(ids).logits
        torch.testing.assert_close(layerwise.logits(branches[0].flatten(0, 1)).view_as(full), full, rtol=0, atol=1e-5)
        for branch, candidate in zip(branches[1:], candidates, strict=True):
            expected = remove_layers(copy.deepcopy(model), [candidate])(ids).logits
            logits = layerwise.logits(branch.flatten(0, 1)).view_as(expected)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_eager_attention_with_masks_of_its_own(family: str) -> None:
    model, ids = tiny_model(family, attn_implementation="eager"), tiny_ids()
    branches = LayerwiseModel(model).forward_with_skips(ids, [1, 4])
    expected = LayerwiseModel(remove_layers(copy.deepcopy(model), [4])).forward_with_skips(ids)[0]
    torch.testing.assert_close(branches[2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_padding_changes_nothing_before_it(family: str) -> None:
    layerwise, ids = LayerwiseModel(tiny_model(family)), tiny_ids(1, 9)
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.long)], dim=1)
    torch.testing.assert_close(
        layerwise.forward_with_skips(padded, [2])[:, :, :9], layerwise.forward_with_skips(ids, [2]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", EVERY)
def test_documents_of_a_row_are_as_if_alone(family: str) -> None:
    """Also where they are longer than a window of 8 tokens, in batches of several rows, and with a layer skipped."""
    layerwise, ids = LayerwiseModel(tiny_model(family)), tiny_ids(2, 24)
    lengths = [[3, 12, 9], [11, 13]]
    document = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in lengths])
    packed = layerwise.forward_with_skips(ids, [2], positions=positions_of(document))
    assert layerwise.runs_packed
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            part = slice(start, start := start + length)
            alone = layerwise.forward_with_skips(ids[row : row + 1, part], [2])
            torch.testing.assert_close(packed[:, row : row + 1, part], alone, rtol=0, atol=1e-5)


def test_recurrent_models_are_known_to_mix_documents() -> None:
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    layerwise = LayerwiseModel(transformers.MambaForCausalLM(transformers.MambaConfig(**fields)).eval())
    assert not layerwise.runs_packed


def test_the_model_runs_as_before_after_a_pass() -> None:
    model, ids = tiny_model("qwen2"), tiny_ids()
    with torch.no_grad():
        before = model(ids).logits
        LayerwiseModel(model).forward_with_skips(ids, [1, 2])
        LayerwiseModel(model).logits(torch.zeros(2, 32))
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_hook_gets_each_layer_of_the_untouched_branch() -> None:
    model, ids = tiny_model("llama"), tiny_ids()
    seen = {}
    LayerwiseModel(model).forward_with_skips(
        ids, [1], hook=lambda position, before, after: seen.update({position: (before, after)})
    )
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for position in range(LAYERS - 1):
        torch.testing.assert_close(seen[position][0], hidden[position], rtol=0, atol=1e-5)
        torch.testing.assert_close(seen[position][1], hidden[position + 1], rtol=0, atol=1e-5)
