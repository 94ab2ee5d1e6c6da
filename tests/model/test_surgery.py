"""Index arithmetic of `KeptLayers`; a shortened model is the same model when it is saved, loaded and generating."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from layerpeel.errors import InputError
from layerpeel.model.architecture import find_architecture
from layerpeel.model.layer_inputs import replaced_forward
from layerpeel.model.surgery import KeptLayers, remove_layers
from tests.families import FAMILIES, LAYERS, UNLISTED, tiny_ids, tiny_model

kept_layers = st.integers(2, 12).flatmap(
    lambda total: st.sets(st.integers(0, total - 1), max_size=total - 1).map(
        lambda gone: (KeptLayers.full(total).without(gone), gone)
    )
)


@given(kept_layers)
def test_kept_layers_are_those_not_removed(case: tuple[KeptLayers, set[int]]) -> None:
    layers, gone = case
    assert set(layers.removed) == gone
    assert [layers.kept[layers.position(layer)] for layer in layers.kept] == list(layers.kept)
    assert len(layers) == layers.total - len(gone)


@given(kept_layers, st.integers(1, 3))
def test_neighbours_are_the_survivors_nearest_to_a_gap(case: tuple[KeptLayers, set[int]], radius: int) -> None:
    layers, gone = case
    expected = set()
    for layer in gone:
        below = [kept for kept in layers.kept if kept < layer][-radius:]
        above = [kept for kept in layers.kept if kept > layer][:radius]
        expected |= {*below, *above}
    assert set(layers.neighbours(radius)) == expected


@given(kept_layers)
def test_above_is_all_from_the_first_gap_up(case: tuple[KeptLayers, set[int]]) -> None:
    layers, gone = case
    expected = [kept for kept in layers.kept if gone and kept > min(gone)]
    assert list(layers.above()) == (expected or (list(layers.kept[-1:]) if gone else []))


@given(kept_layers)
def test_first_changed_is_where_the_shared_prefix_ends(case: tuple[KeptLayers, set[int]]) -> None:
    layers, gone = case
    assert layers.first_changed == min([*gone, layers.total]) or layers.first_changed == len(layers) < min(gone)


def test_removable_leaves_out_protected_layers() -> None:
    assert KeptLayers.full(6).without([2]).removable(first=1, last=2, layers=[3]) == (1,)


@pytest.mark.parametrize("removed", [[2], [0, 5], [1, 2, 4]])
@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_saved_and_loaded_is_the_model_in_memory(family: str, removed: list[int], tmp_path: Path) -> None:
    model = remove_layers(tiny_model(family), removed)
    ids = tiny_ids()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == LAYERS - len(removed)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    uncached = model.generate(ids, use_cache=False, **ask)
    assert torch.equal(model.generate(ids, use_cache=True, **ask), uncached)
    assert torch.equal(loaded.generate(ids, use_cache=True, **ask), uncached)


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_skipping_is_removing(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    shorter = remove_layers(copy.deepcopy(model), [3])
    layers = find_architecture(model).layers
    with replaced_forward(layers[3], lambda hidden, *_, **__: hidden), torch.no_grad():
        skipped = model(ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(shorter(ids).logits, skipped, rtol=0, atol=1e-5)


def test_counters_and_lists_follow() -> None:
    config = remove_layers(tiny_model("qwen2"), [0, 4]).config
    assert config.max_window_layers == 2
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [([6], "layer 6 cannot be removed: the layers there are 0 to 5"), (range(6), "leaves no model")],
)
def test_impossible_removals_say_so(layers: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        remove_layers(tiny_model("llama"), layers)


def test_unknown_families_whose_layers_cannot_be_found_are_refused() -> None:
    model = tiny_model("jais2")
    model.model.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(LAYERS)])
    with pytest.raises(InputError, match="'jais2' is not known, and its layers cannot be found without doubt"):
        remove_layers(model, [0])
