"""What a config cannot express is refused, with the first difference, and the model left alone."""

from __future__ import annotations

import copy
import re

import pytest

from layerpeel.errors import InputError
from layerpeel.model.config_check import unremovable_layers
from layerpeel.model.surgery import remove_layers
from tests.families import LAYERS, tiny_model


def test_a_config_that_cannot_express_a_removal_is_refused_and_the_model_left_alone() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(InputError, match=r"a gpt2 config cannot express this removal: layer 3 .*attn\.scaling"):
        remove_layers(model, [2])
    assert model.config.to_dict() == before and len(model.transformer.h) == LAYERS
    remove_layers(model, [5])  # what lies below keeps its index


def test_unremovable_layers_are_those_that_cannot_go_alone() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = copy.deepcopy(model.config.to_dict())
    fixed = unremovable_layers(model)
    assert list(fixed) == [0, 1, 2, 3, 4]
    # 1 / sqrt(8) / 3 instead of 1 / sqrt(8) / 4
    assert re.match(r"layer 3 would be loaded with attn\.scaling = 0\.11785\d+ instead of 0\.08838\d+$", fixed[2])
    assert model.config.to_dict() == before and len(model.transformer.h) == LAYERS
    assert unremovable_layers(tiny_model("gpt2")) == {}


def test_a_list_of_another_name_that_the_forward_reads_by_index_is_seen() -> None:
    model = tiny_model("gemma2")
    model.model.config.layer_types = model.config.layer_types
    kinds = list(model.config.layer_types)
    original = model.model.forward

    def forward(*args, **kwargs):  # a model that keeps its kinds where no config field says them
        shown, model.config.layer_types = model.config.layer_types, kinds[: len(model.model.layers)]
        try:
            return original(*args, **kwargs)
        finally:
            model.config.layer_types = shown

    model.model.forward = forward
    with pytest.raises(InputError, match=r"layer 1 would be given another attention_mask"):
        remove_layers(model, [0])
    assert len(model.model.layers) == LAYERS and model.config.layer_types == kinds


def test_layers_that_share_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[4].mlp = model.model.layers[1].mlp
    with pytest.raises(InputError, match="layers share their weights"):
        remove_layers(model, [1])
    assert set(unremovable_layers(model)) == {1, 4}
