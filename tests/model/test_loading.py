"""What was saved is loaded back and compared before it replaces anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerpeel.errors import RunError
from layerpeel.model import saving as models
from layerpeel.model.saving import check_saved, save_model
from layerpeel.model.surgery import remove_layers
from tests.families import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "mixtral", "bamba", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_what_is_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = remove_layers(tiny_model(family), [2])
    save_model(model, tiny_tokenizer(), tmp_path / "student", dtype)
    check_saved(model, tmp_path / "student", dtype)
    assert model.dtype == torch.float32


def _change_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _lose_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * 5
    (folder / "config.json").write_text(json.dumps(config))


def _tear(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"torn")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change_tensor, "another value of model.layers.3.mlp.up_proj.weight"),
        (_lose_tensor, r"other tensors \(model.norm.weight\)"),
        (_change_config, r"self_attn\.layer_type = 'full_attention' instead of 'sliding_attention'"),
        (_tear, "an error"),
    ],
)
def test_a_checkpoint_that_is_another_model_is_refused(damage, message: str, tmp_path: Path) -> None:
    model = remove_layers(tiny_model("qwen2"), [2])
    save_model(model, tiny_tokenizer(), tmp_path / "student", torch.float32)
    damage(tmp_path / "student")
    with pytest.raises(RunError, match=rf"student: the checkpoint that was just written loads with .*{message}"):
        check_saved(model, tmp_path / "student", torch.float32)


def test_a_bad_checkpoint_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "student", torch.float32)
    good = (tmp_path / "student/model.safetensors").read_bytes()
    own = models.check_saved

    def damaged_first(model, folder, dtype):
        _change_tensor(folder)
        own(model, folder, dtype)

    monkeypatch.setattr(models, "check_saved", damaged_first)
    with pytest.raises(RunError, match="another value of"):
        save_model(remove_layers(tiny_model("llama"), [5]), tiny_tokenizer(), tmp_path / "student", torch.float32)
    assert (tmp_path / "student/model.safetensors").read_bytes() == good
    shutil.rmtree(tmp_path / ".student.partial")  # kept for inspection
