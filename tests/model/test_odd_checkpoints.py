"""Checkpoints that people have: each is loaded right, or refused with its reason, in every way of reading it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from layerpeel.errors import InputError, RunError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model import removal
from layerpeel.model.loading import load_model
from layerpeel.model.new_tensors import NewTensor
from layerpeel.model.removal import remove_from_files
from layerpeel.model.streaming import load_streamed
from layerpeel.model.surgery import remove_layers
from tests.families import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

Tensors = dict[str, Tensor]
PROJECTION = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "teacher")


def edit(folder: Path, change: Callable[[Tensors], object], **fields: Any) -> None:
    """Changes the tensors of a checkpoint, and fields of its config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_fields(folder, **fields)


def set_fields(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def every_refusal(folder: Path) -> str:
    """What is said where the model is loaded, streamed and shortened; the same each time."""
    said = set()
    for read in (
        lambda: load_model(folder, device="cpu"),
        lambda: load_streamed(folder, device="cpu"),
        lambda: remove_from_files(folder, [2], folder.with_name("student")),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert caught.value.hint
        said.add(f"{caught.value} / {caught.value.hint}")
    assert len(said) == 1
    return said.pop()


def in_float8(tensors: Tensors) -> None:
    weight = tensors[f"{PROJECTION}.weight"]
    scale = weight.abs().max() / 448
    tensors[f"{PROJECTION}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors |= {f"{PROJECTION}.weight_scale": scale, f"{PROJECTION}.input_scale": scale.clone()}


@pytest.mark.parametrize("described", [True, False])
def test_scales_of_model_optimizer_are_refused_not_ignored(folder: Path, described: bool) -> None:
    fields = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}} if described else {}
    edit(folder, in_float8, **fields)
    if described:
        with pytest.raises(InputError, match=rf"quantised .config\.json says modelopt.*: {PROJECTION}\.input_scale"):
            load_model(folder, device="cpu")
        with pytest.raises(InputError, match=r"quantised .modelopt., and layers that are read one at a time"):
            load_streamed(folder, device="cpu")
        with pytest.raises(InputError, match="modelopt"):
            remove_from_files(folder, [2], folder.with_name("student"))
    else:
        assert "the weights are quantised, and transformers does not undo it" in every_refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "weight_scale_2",
        "weight_scale_inv",
        "qweight",
        "scales",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_what_quantisers_store_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({f"{PROJECTION}.{name}": torch.ones(4)}))
    said = every_refusal(folder)
    assert f"{PROJECTION}.{name}" in said and "take the unquantised checkpoint" in said


def test_a_config_that_says_quantised_of_plain_weights_is_refused(folder: Path) -> None:
    set_fields(folder, quantization_config={"quant_method": "modelopt"})
    with pytest.raises(InputError, match=r"the model is quantised .config\.json says modelopt.") as caught:
        load_model(folder, device="cpu")
    assert "take quantization_config out of config.json" in str(caught.value.hint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_integers_in_place_of_weights_are_refused(folder: Path, dtype: torch.dtype) -> None:
    edit(folder, lambda tensors: tensors.update({f"{PROJECTION}.weight": torch.ones(48, 32).to(dtype)}))
    said = every_refusal(folder)
    assert f"{PROJECTION}.weight is stored as " in said and "quantised, and config.json does not say how" in said


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", [f"{PROJECTION}.weight", "model.layers.1.mlp.experts.gate_up_proj"])
def test_floats_of_eight_bits_without_scales_are_refused(folder: Path, dtype: torch.dtype, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.ones(48, 32).to(dtype)}))
    said = every_refusal(folder)
    assert f"{name} is stored as F8_E" in said and "quantised, and config.json does not say how" in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_wide_and_half_floats_are_no_quantisation(folder: Path, dtype: torch.dtype) -> None:
    before = load_file(folder / "model.safetensors")[f"{PROJECTION}.weight"]
    edit(folder, lambda tensors: tensors.update({f"{PROJECTION}.weight": before.to(dtype)}))
    model, _ = load_model(folder, device="cpu")
    assert torch.equal(model.state_dict()[f"{PROJECTION}.weight"], before.to(dtype).float())


@pytest.mark.parametrize("rows", [1, 0])
def test_a_vocabulary_with_nothing_to_predict_is_refused(folder: Path, rows: int) -> None:
    set_fields(folder, vocab_size=rows)
    assert f"config.json gives the model a vocabulary of {rows} (vocab_size)" in every_refusal(folder)


def test_adapter_tensors_in_the_file_are_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"{PROJECTION}.lora_A.weight": torch.ones(2, 32)}))
    said = every_refusal(folder)
    assert "an adapter that is not merged into the weights: model.layers.1.mlp.up_proj.lora_A.weight" in said


def test_a_file_deeper_than_its_config_is_refused(folder: Path) -> None:
    set_fields(folder, num_hidden_layers=5)
    assert "the checkpoint holds layers 0 to 5, and config.json says 5 layers" in every_refusal(folder)


def test_a_file_shallower_than_its_config_is_refused(folder: Path) -> None:
    set_fields(folder, num_hidden_layers=7)
    assert "the checkpoint lacks weights of its model: model.layers.6." in every_refusal(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_with_a_prefix_of_a_wrapper_are_explained(folder: Path, prefix: str) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit(folder, rename)
    assert f"the checkpoint's names begin with '{prefix}'" in every_refusal(folder)


def test_other_tensors_without_a_place_are_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 32)}))
    assert "has no place for: v_head.summary.weight / " in every_refusal(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: [*plan, replace(plan[0], name="v_head.weight")], "holds tensors that its model has no place for"),
        (lambda plan: plan[1:], "lacks weights of its model"),
    ],
)
def test_a_removal_that_writes_other_tensors_than_its_model_has_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[NewTensor]], list[NewTensor]], reason: str
) -> None:
    plan, student = removal._plan, folder.with_name("student")

    def changed_plan(*args: Any) -> tuple[list[NewTensor], dict[str, int]]:
        tensors, dropped = plan(*args)
        return change(tensors), dropped

    monkeypatch.setattr(removal, "_plan", changed_plan)
    with pytest.raises(RunError, match=rf"would load with an error \(.*{reason}: .*\); nothing was written"):
        remove_from_files(folder, [2], student)
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_bigcode", "transformer.h.0.attn.bias"),
        ("falcon", "transformer.h.0.self_attention.maybe_rotary.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.cos_cached"),
        ("xglm", "model.embed_positions.weights"),
    ],
)
def test_masks_and_positions_that_older_checkpoints_hold_are_no_weights(family: str, name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", family)
    expected = load_model(folder, device="cpu")[0](tiny_ids()).logits
    edit(folder, lambda tensors: tensors.update({name: torch.ones(1, 1, 64, 64)}))
    assert torch.equal(load_model(folder, device="cpu")[0](tiny_ids()).logits, expected)
    remove_from_files(folder, [2], tmp_path / "student")
    load_model(tmp_path / "student", device="cpu")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", "glm4_moe")
    before = load_model(folder, device="cpu")[0](tiny_ids()).logits

    def add(tensors: Tensors) -> None:
        further = {n.replace("layers.5.", "layers.6."): v.clone() for n, v in tensors.items() if "layers.5." in n}
        tensors |= further | {"model.layers.6.eh_proj.weight": torch.ones(4, 4)}

    edit(folder, add, num_nextn_predict_layers=1)
    assert torch.equal(load_model(folder, device="cpu")[0](tiny_ids()).logits, before)
    edit(folder, lambda tensors: None, num_nextn_predict_layers=0)
    with pytest.raises(InputError, match=r"the checkpoint holds layers 0 to 6, and config.json says 6 layers"):
        load_model(folder, device="cpu")


def test_leftover_shards_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    model, folder = tiny_model("llama"), tmp_path / "teacher"
    model.save_pretrained(folder, max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(folder)
    old = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if "layers" in name}
    save_file(old, folder / "model-99999-of-99999.safetensors", metadata={"format": "pt"})
    (folder / "training.safetensors").write_bytes(b"not read, so not looked at")
    streamed, _ = load_streamed(folder, device="cpu")
    layerwise = LayerwiseModel(streamed.model, streamed.weights_loaded)
    assert layerwise.model is streamed.model
    with streamed.weights_loaded(2):
        layer = layerwise.layers[2]
        expected = model.state_dict()
        for name, value in layer.state_dict().items():
            assert torch.equal(value, expected[f"model.layers.2.{name}"])


def test_streamed_layers_have_the_dtypes_of_those_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    name = "model.layers.4.input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({name: 6.9 + 0.12 * torch.rand_like(tensors[name])}))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.get_parameter(name).dtype == torch.float32
    streamed, _ = load_streamed(folder, device="cpu", dtype="bfloat16")
    with streamed.weights_loaded(4):
        for part, value in LayerwiseModel(streamed.model).layers[4].state_dict().items():
            expected = model.state_dict()[f"model.layers.4.{part}"]
            assert value.dtype == expected.dtype and torch.equal(value, expected), part


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"output_router_logits": True},
        {"return_dict": False},
        {"use_cache": False},
        {"torchscript": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_switches_of_what_a_forward_returns_do_no_harm(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", family)
    usual = remove_layers(load_model(folder, device="cpu")[0], [2])(tiny_ids())
    set_fields(folder, **fields)
    model, _ = load_model(folder, device="cpu")
    output = remove_layers(model, [2])(tiny_ids())
    assert torch.equal(output.logits, usual.logits) and list(output) == list(usual)
    remove_from_files(folder, [2], tmp_path / "student")
    assert torch.equal(load_model(tmp_path / "student", device="cpu")[0](tiny_ids()).logits, usual.logits)
    saved = json.loads((tmp_path / "student/config.json").read_text())
    assert saved == saved | fields  # as published


def test_attention_that_is_not_installed_is_replaced_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_model(folder, device="cpu")[0](tiny_ids()).logits
    for name in ("attn_implementation", "_attn_implementation"):
        set_fields(folder, **{name: "flash_attention_2"})
        assert torch.equal(load_model(folder, device="cpu")[0](tiny_ids()).logits, expected)
    assert "asks for flash_attention_2, which is not installed" in capsys.readouterr().err
    remove_from_files(folder, [2], folder.with_name("student"))


@pytest.mark.parametrize("name", ["flash_attention_3", "flex_attention", "paged|sdpa", "kernels-community/x", "typo"])
def test_attention_that_does_not_run_here_is_replaced_too(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_fields(folder, attn_implementation=name)
    model, _ = load_model(folder, device="cpu")
    model(tiny_ids()).logits.sum().backward()
    assert f"asks for {name}, which is not installed or not for this use" in capsys.readouterr().err
    assert model.config._attn_implementation == "sdpa"


def test_an_image_token_without_an_embedding_is_said_and_refused_in_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder, device="cpu")
    assert "no embedding for <image>" in capsys.readouterr().err
    model(**tokenizer("w5 w6", return_tensors="pt", return_token_type_ids=False))
    with pytest.raises(InputError, match=r"the text holds a token that the model has no embedding for .<image>."):
        model(**tokenizer("w5 <image>", return_tensors="pt", return_token_type_ids=False))


def test_a_word_without_an_embedding_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"different vocabularies: .* text can hold 'newword'"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("model.gguf", "GGUF files are not read"), ("pytorch_model.bin", "pickled weights are not read")],
)
def test_other_formats_are_refused_with_what_to_do(folder: Path, name: str, hint: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError) as caught:
        load_model(folder, device="cpu")
    assert hint in str(caught.value.hint)


def test_a_quantised_teacher_is_told_so_not_that_only_safetensors_are_read(folder: Path) -> None:
    set_fields(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(InputError) as caught:
        load_model(folder, device="cpu")
    assert "take the unquantised checkpoint" in str(caught.value.hint)


def test_a_generation_config_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 2, "num_return_sequences": 3}))
    with pytest.raises(InputError, match="num_return_sequences") as caught:
        load_model(folder, device="cpu")
    assert "transformers cannot read generation_config.json: mend it, or take it away" in str(caught.value.hint)
