"""Every family with a row is right in all that the package does with it, and every refused one is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerpeel.config.distill import DistillConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.architecture import find_architecture
from layerpeel.model.config_check import unremovable_layers
from layerpeel.model.config_fields import shortened_fields
from layerpeel.model.families import FAMILIES, REFUSED
from layerpeel.model.family_table import families_markdown, family_statuses
from layerpeel.model.layer_inputs import replaced_forward
from layerpeel.model.surgery import remove_layers
from layerpeel.training.rounds import distill
from tests.families import LAYERS, tiny_config, tiny_ids, tiny_model, tiny_tokenizer

# Layers of the tiny models that may not go; all others may.
FIXED = {
    "diffllama": {0, 1, 2, 3, 4},
    "gemma4_text": {4, 5},
    "gemma4_unified_text": {4, 5},
    "gpt_neox_japanese": {5},
    "jamba": {1, 2, 4},
    "modernbert-decoder": {0},
}
# One family of each kind (GPT-2's names, hybrid, sparse, multimodal, shared KV, ...); `make check` runs them all.
QUICK = {"llama", "gpt2", "gemma3", "gemma4_text", "jamba", "mamba", "qwen2_moe"}
TEXT = " ".join(f"w{3 + 7 * word % 60}" for word in range(40))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_a_family_is_right(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), tiny_ids()
    fixed = unremovable_layers(model)
    assert set(fixed) == FIXED.get(family, set()), fixed
    free = [layer for layer in range(LAYERS) if layer not in fixed]
    one_pass_and_skipping_are_removing(model, ids, free)
    middle = free[len(free) // 2]
    three = free[-3:] if fixed else [0, 3, 4]
    for number, removed in enumerate([[free[0]], [middle], [free[-1]], three]):
        saved_and_loaded_is_the_model_in_memory(model, removed, ids, tmp_path / str(number))
    (tmp_path / "text.txt").write_text(TEXT)
    settings = DistillConfig(
        text=str(tmp_path / "text.txt"), tokens_per_round=32, tokens_per_step=16, sequence_length=8, train="all"
    )
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    student, result = distill(model, tiny_tokenizer(), [middle], settings)
    assert result.steps == 2 and all(math.isfinite(point["loss"]) for point in result.curve)
    with torch.no_grad():
        untrained = remove_layers(copy.deepcopy(model), [middle])(ids, use_cache=False).logits
        assert not torch.allclose(student(ids, use_cache=False).logits, untrained, rtol=0, atol=1e-5)
        assert torch.equal(model(ids, use_cache=False).logits, before)


@torch.no_grad()
def one_pass_and_skipping_are_removing(model: PreTrainedModel, ids: torch.Tensor, free: list[int]) -> None:
    layerwise = LayerwiseModel(model)
    branches, logits = layerwise.forward_with_skips(ids, free), model(ids, use_cache=False).logits
    for branch, layer in zip(branches, [None, *free], strict=True):
        shorter = model if layer is None else remove_layers(copy.deepcopy(model), [layer])
        expected = shorter(ids, use_cache=False).logits
        torch.testing.assert_close(layerwise.logits(branch.flatten(0, 1)).view_as(logits), expected, rtol=0, atol=1e-5)
        if layer is not None:
            with replaced_forward(
                layerwise.layers[layer], lambda hidden, *_, **__: layerwise.layer_inputs.form(hidden, None)
            ):
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(model(ids, use_cache=False).logits, logits)
    padded = torch.cat([ids[:, :9], torch.zeros(3, 6, dtype=torch.long)], dim=1)
    torch.testing.assert_close(
        layerwise.forward_with_skips(padded)[:, :, :9], layerwise.forward_with_skips(ids[:, :9]), rtol=0, atol=1e-4
    )


@torch.no_grad()
def saved_and_loaded_is_the_model_in_memory(
    model: PreTrainedModel, removed: list[int], ids: torch.Tensor, folder: Path
) -> None:
    shorter = copy.deepcopy(model)
    if len(removed) == 3 and removed != [0, 3, 4]:  # one after the other, as a run does: the end of the stack
        for layer in reversed(removed):
            remove_layers(shorter, [layer])
    else:
        remove_layers(shorter, removed)
    shorter.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(find_architecture(loaded).layers) == LAYERS - len(removed)
    torch.testing.assert_close(loaded(ids).logits, shorter(ids).logits, rtol=0, atol=1e-6)
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    uncached = shorter.generate(ids, use_cache=False, **ask)
    assert torch.equal(shorter.generate(ids, use_cache=True, **ask), uncached)
    assert torch.equal(loaded.generate(ids, use_cache=True, **ask), uncached)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_refused_family_is_refused_with_a_reason(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.config.to_dict())
    for layer in range(LAYERS):
        with pytest.raises(InputError, match=r"cannot (express|be run layer by layer|be found without doubt)"):
            remove_layers(model, [layer])
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", sorted(FIXED))
def test_families_of_which_layers_stay_say_why(family: str) -> None:
    assert FAMILIES[family].note


def test_the_page_of_families_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "families.md"
    remedy = "layerpeel families --markdown > docs/families.md"
    assert page.read_text(encoding="utf-8") == families_markdown(), remedy


def test_no_family_is_both_tested_and_refused() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()
    assert {status.family for status in family_statuses()} == FAMILIES.keys() | REFUSED.keys()


def test_steps_become_lists() -> None:
    fields = shortened_fields(tiny_config("qwen2_moe"), [0, 2, 3, 5])
    assert (fields["decoder_sparse_step"], fields["mlp_only_layers"]) == (1, [0, 1, 2])  # 1 and 5 had experts, 3 not
    fields = shortened_fields(tiny_config("llama4_text"), [1, 2, 3])
    assert (fields["moe_layers"], fields["no_rope_layers"]) == ([0, 2], [0, 1, 0])


def test_periods_follow_where_there_is_one() -> None:
    config = tiny_config("jamba")  # attention at 1 and 4, experts at 1, 3 and 5
    fields = shortened_fields(config, [1, 2, 3, 4, 5])
    assert (fields["attn_layer_period"], fields["attn_layer_offset"]) == (3, 0)
    assert (fields["expert_layer_period"], fields["expert_layer_offset"]) == (2, 0)
    assert "expert_layer_period" not in shortened_fields(config, [0, 1, 3, 4, 5])


def test_ranges_and_patterns_follow() -> None:
    fields = shortened_fields(tiny_config("ernie4_5_moe"), [0, 2, 3, 5])
    assert (fields["moe_layer_start_index"], fields["moe_layer_end_index"]) == (1, 2)
    assert shortened_fields(tiny_config("gpt_neo"), [0, 2, 3])["attention_types"] == [
        [["global"], 1],
        [["global"], 1],
        [["local"], 1],
    ]
    assert shortened_fields(tiny_config("recurrent_gemma"), [0, 2, 3])["block_types"] == [
        "recurrent",
        "attention",
        "recurrent",
    ]
