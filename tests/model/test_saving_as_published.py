"""What a student is like to the programs that read it: once, in its own dtypes, with its files, said in both forms."""

from __future__ import annotations

import fnmatch
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.export.student import export_student
from layerpeel.model.architecture import count_parameters
from layerpeel.model.checkpoint import stored_dtype
from layerpeel.model.loading import load_model
from layerpeel.model.origin import origin_of, stored_dtypes
from layerpeel.model.removal import remove_from_files
from layerpeel.model.rotary_fields import old_rotary_fields
from layerpeel.model.saved_config import student_config
from layerpeel.model.saving import save_model
from layerpeel.model.side_files import CARRIED, in_any_case, is_carried
from layerpeel.model.surgery import remove_layers
from layerpeel.model.tensor_files import stored_tensors
from layerpeel.run.loop import peel
from tests.families import tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from tests.model.test_round_trips import publish

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 16,
}


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def saved(teacher: Path, folder: Path, dtype: str = "auto") -> Path:
    """What a run writes that removed layer 2 and trained nothing."""
    model, tokenizer = load_model(teacher, dtype=dtype)
    remove_layers(model, [2])
    save_model(model, tokenizer, folder, stored_dtype(teacher), origin_of(teacher).with_layers([0, 1, 3, 4, 5]))
    return folder


def removed(teacher: Path, folder: Path, dtype: str = "auto") -> Path:
    """What `layerpeel remove` writes."""
    remove_from_files(teacher, [2], folder)
    return folder


both_ways = pytest.mark.parametrize("write", [saved, removed])


@both_ways
def test_a_tied_head_is_written_once_and_the_config_says_bfloat16(write, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "gemma3_text", tie_word_embeddings=True)
    folder = write(teacher, tmp_path / "short")
    assert "lm_head.weight" not in stored_tensors(folder)
    assert (folder / "model.safetensors").stat().st_size < (teacher / "model.safetensors").stat().st_size
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@both_ways
def test_a_head_that_the_publisher_wrote_twice_is_written_once(write, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "gemma3_text", tie_word_embeddings=True)
    tensors = load_file(teacher / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" not in stored_tensors(write(teacher, tmp_path / "short"))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "mamba2", "ernie4_5_moe", "nemotron_h"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_parts_of_a_bfloat16_checkpoint_keep_every_bit(family: str, dtype: str, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", family)
    before, after = stored_tensors(teacher), stored_tensors(saved(teacher, tmp_path / "short", dtype))
    assert {tensor.dtype for tensor in after.values()} >= {"F32", "BF16"}
    originals = {b"".join(tensor.chunks()) for tensor in before.values()}
    assert all(b"".join(tensor.chunks()) in originals for tensor in after.values())


def test_trained_tensors_keep_the_dtype_that_they_were_stored_in(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    model, tokenizer = load_model(teacher)
    dtypes = stored_dtypes(origin_of(teacher), model)
    assert dtypes.of("model.layers.3.input_layernorm.weight") is torch.float32
    assert dtypes.of("model.layers.3.mlp.up_proj.weight") is torch.bfloat16
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 0.5
        model.model.layers[3].input_layernorm.weight += 1 / 3
    expected = model.model.layers[3].input_layernorm.weight.clone()
    save_model(model, tokenizer, tmp_path / "student", torch.bfloat16, origin_of(teacher))
    tensors, before = load_file(tmp_path / "student/model.safetensors"), load_file(teacher / "model.safetensors")
    assert torch.equal(tensors["model.layers.3.input_layernorm.weight"], expected)
    changed = {name for name in tensors if not torch.equal(tensors[name], before[name])}
    assert changed == {"model.layers.3.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight"}
    assert tensors["model.layers.3.mlp.up_proj.weight"].dtype is torch.bfloat16


def test_a_longrope_model_that_ran_past_its_switch_is_saved(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    model, tokenizer = load_model(teacher)
    model(tiny_ids(1, 40))  # longer than 16 tokens: its frequencies are now the long ones
    remove_layers(model, [2])
    save_model(model, tokenizer, tmp_path / "short", torch.bfloat16, origin_of(teacher).with_layers([0, 1, 3, 4, 5]))
    config = json.loads((tmp_path / "short/config.json").read_text())
    assert config["rope_scaling"] == {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    assert config["original_max_position_embeddings"] == 16 and config["rope_parameters"]["rope_type"] == "longrope"


@both_ways
@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states"])
def test_switches_of_the_publishers_config_stay(write, switch: str, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    change_config(teacher, **{switch: True, "attn_implementation": "eager"})
    assert json.loads((write(teacher, tmp_path / "short") / "config.json").read_text())[switch] is True


@both_ways
def test_a_counter_of_modules_whose_tensors_are_gone_is_zero(write, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "glm4_moe")
    tensors = load_file(teacher / "model.safetensors")
    further = {n.replace("layers.5.", "layers.6."): v.clone() for n, v in tensors.items() if "layers.5." in n}
    save_file(tensors | further, teacher / "model.safetensors", metadata={"format": "pt"})
    change_config(teacher, num_nextn_predict_layers=1)
    folder = write(teacher, tmp_path / "short")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not [name for name in stored_tensors(folder) if "layers.5." in name]


def test_rotary_parameters_are_said_in_the_form_before_transformers_5_too(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "gemma3_text")
    change_config(
        teacher,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    config = json.loads((removed(teacher, tmp_path / "short") / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 2e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_theta": 5e5}),
        ("gpt_neox", {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
        ("stablelm", {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
        ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4}),
        ("qwen2", {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ],
)
def test_a_config_in_the_old_form_is_said_in_the_new_one_too(family: str, fields: dict[str, object]) -> None:
    published = json.loads(json.dumps(tiny_config(family).to_diff_dict(), default=str))
    published = {name: value for name, value in published.items() if name != "rope_parameters"} | fields
    config = AutoConfig.for_model(**published)
    written = student_config(published, config, [0, 1, 2, 3, 4], torch.bfloat16).fields
    assert {name: written[name] for name in fields} == fields
    assert written["rope_parameters"] == config.rope_parameters and old_rotary_fields(config)


@both_ways
def test_a_teacher_that_another_may_not_read_gives_a_student_that_others_may(write, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    for path in teacher.iterdir():
        path.chmod(0o600)
    folder = write(teacher, tmp_path / "short")
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)  # 0644, less the umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {expected}


def test_files_that_hold_of_the_student_too() -> None:
    assert all(map(is_carried, ["LICENSE", "LICENCE.md", "NOTICE.txt", "tokenizer.model", "vocab.json", "merges.txt"]))
    assert all(map(is_carried, ["special_tokens_map.json", "chat_template.jinja", "added_tokens.json", "tekken.json"]))
    assert all(map(is_carried, ["preprocessor_config.json", "processor_config.json", "generation_config.json"]))
    assert all(
        map(is_carried, ["Acceptable_Use_Policy.md", "Terms_of_Use.txt", "Notice", "qwen.tiktoken", "CITATION.cff"])
    )
    assert not any(map(is_carried, ["pytorch_model.bin", "model.gguf", "quantize_config.json", "README.md"]))
    assert not any(map(is_carried, ["model.safetensors.index.json", "params.json", "config.json"]))
    assert is_carried("modeling_own.py", code=True) and not is_carried("modeling_own.py")


def test_a_licence_in_any_case_is_fetched_from_the_hub() -> None:
    for name in ("LICENSE", "License.txt", "Notice", "use_policy.MD"):
        assert any(fnmatch.fnmatchcase(name, in_any_case(pattern)) for pattern in CARRIED), name
    assert not any(fnmatch.fnmatchcase("pytorch_model.bin", in_any_case(pattern)) for pattern in CARRIED)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_remove_counts_a_tied_head_once(family: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    model = tiny_model(family, tie_word_embeddings=True)
    model.save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    removal = remove_from_files(teacher, [2], tmp_path / "short")
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert (removal.teacher_parameters, removal.parameters) == (count_parameters(model), count_parameters(short))


def test_remove_writes_several_files_and_an_index_where_there_is_much(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    remove_from_files(teacher, [2], tmp_path / "short", shard_size=20_000)
    files = sorted(path.name for path in (tmp_path / "short").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    expected = remove_layers(AutoModelForCausalLM.from_pretrained(teacher), [2])
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_remove_reads_several_files_and_no_leftover_beside_them(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    remove_from_files(teacher, [2], tmp_path / "first", shard_size=20_000)
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "first/leftover.safetensors")
    remove_from_files(tmp_path / "first", [3], tmp_path / "short")
    assert load_file(tmp_path / "short/model.safetensors")["model.norm.weight"].abs().sum() > 1


def test_remove_leaves_nothing_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = publish(tmp_path / "teacher", "llama")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerpeel.model.removal.check_written", full)
    with pytest.raises(OSError, match="No space left"):
        remove_from_files(teacher, [2], tmp_path / "short")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_remove_refuses_what_the_config_cannot_say(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "gpt_neox_japanese")
    with pytest.raises(InputError, match="config cannot express this removal"):
        remove_from_files(teacher, [5], tmp_path / "short")


def test_remove_refuses_a_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "llama")
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its model: model\.layers\.4\.mlp\.up_proj\.weight"):
        remove_from_files(teacher, [2], tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_a_model_without_an_origin_is_saved_whole(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "short", torch.bfloat16)
    assert json.loads((tmp_path / "short/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "short").values()} == {"BF16"}


def test_nan_in_an_embedding_that_no_text_uses_is_saved_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[12] = float("nan")
    save_model(model, tiny_tokenizer(), tmp_path / "short", torch.float32)
    stored = load_file(tmp_path / "short/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored.isnan().all(1).nonzero(), torch.tensor([[12]]))


def test_float32_parts_survive_a_run_its_resumption_and_an_export(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", "glm4_moe")
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + 7 * word % 60}" for word in range(400)))
    config = RunConfig.model_validate(
        {
            "teacher": str(teacher),
            "output": str(tmp_path / "run"),
            "stop": {"target_layers": 4},
            "score": {"decide": "teacher_kl", "tokens": 64},
            "tasks": [{"kind": "perplexity", "name": "ppl", "data": str(tmp_path / "text.txt")}],
            "distill": {
                "text": str(tmp_path / "text.txt"),
                "tokens_per_round": 64,
                "tokens_per_step": 32,
                "sequence_length": 16,
                "train": "all",
            },
        }
    )
    peel(config.model_copy(update={"stop": config.stop.model_copy(update={"target_layers": 5})}))
    (tmp_path / "run/student").rename(tmp_path / "first")
    run = peel(config, accept_changes=True)
    export_student(run, tmp_path / "exported", 1)
    originals = {b"".join(t.chunks()) for name, t in stored_tensors(teacher).items() if "e_score_correction" in name}
    assert originals
    for folder in (run.student_folder, tmp_path / "first", tmp_path / "exported"):
        tensors = stored_tensors(folder)
        biases = [tensor for name, tensor in tensors.items() if "e_score_correction" in name]
        assert biases and all(tensor.dtype == "F32" and b"".join(tensor.chunks()) in originals for tensor in biases)
        assert {tensor.dtype for tensor in tensors.values()} == {"F32", "BF16"}
        assert (folder / "LICENSE").is_file() and (folder / "README.md").is_file()
