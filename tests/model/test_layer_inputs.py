"""Layers' arguments are told apart by how they follow the batch; models that call layers otherwise are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.architecture import find_architecture
from layerpeel.model.layer_inputs import LayerInputRecorder, take_rows
from tests.families import tiny_ids, tiny_model


@pytest.mark.parametrize("batch", [2, 4])  # 4 is the number of heads
@pytest.mark.parametrize("family", ["mpt", "bloom", "falcon"])
def test_biases_of_heads_are_not_taken_for_rows(family: str, batch: int) -> None:
    layerwise, ids = LayerwiseModel(tiny_model(family)), tiny_ids(batch, 9)
    layerwise.tokens_per_call = 9  # row by row
    rows = layerwise.forward_with_skips(ids, [2])
    torch.testing.assert_close(rows, LayerwiseModel(layerwise.model).forward_with_skips(ids, [2]), rtol=0, atol=1e-5)
    alone = torch.cat([layerwise.forward_with_skips(row[None], [2]) for row in ids], dim=1)
    torch.testing.assert_close(rows, alone, rtol=0, atol=1e-5)


def test_rows_are_taken_by_how_arguments_follow_the_batch() -> None:
    per_row = {(("bias",), 2): 2, (("table",), 2): 0}
    arguments = {"bias": torch.arange(8).view(4, 2), "table": torch.ones(2, 2), "mask": torch.ones(2, 1), "flag": True}
    taken = take_rows(arguments, torch.tensor([1]), 2, per_row, ())
    assert taken["bias"].tolist() == [[4, 5], [6, 7]]  # two rows for each of the batch
    assert taken["table"].shape == (2, 2) and taken["mask"].shape == (1, 1) and taken["flag"] is True


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("zaya", "its layers hand each other more than hidden states"),
        ("hy_v4", r"hidden states have shape \(2, 5, 4, 32\)"),
        ("nanochat", "it changes the hidden states between the last layer and the final norm"),
    ],
)
def test_models_that_do_more_than_run_their_layers_are_refused(family: str, message: str) -> None:
    with pytest.raises(InputError, match=f"cannot be run layer by layer: .*{message}"):
        LayerwiseModel(tiny_model(family))


def test_what_happens_after_the_norm_is_seen() -> None:
    model = tiny_model("llama")
    architecture = find_architecture(model)
    forward = model.model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.model.forward = doubled
    with pytest.raises(InputError, match="it changes the hidden states after the final norm"):
        LayerInputRecorder(architecture)


def test_layers_in_another_order_are_seen() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[0], *layers[2:]])
    with pytest.raises(InputError, match="it runs its layers in the order"):
        LayerwiseModel(model)
