"""A published checkpoint without some layers, in every family: as its publisher would have made it, to the last bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from layerpeel.model.config_fields import text_config
from layerpeel.model.families import FAMILIES
from layerpeel.model.family_table import ONLY_NEW_ROTARY
from layerpeel.model.origin import origin_of
from layerpeel.model.removal import remove_from_files
from layerpeel.model.rotary_fields import old_rotary_fields
from layerpeel.model.saving import save_model
from layerpeel.model.surgery import remove_layers
from layerpeel.model.tensor_files import stored_tensors
from tests.families import tiny_model, tiny_tokenizer

WIDE = re.compile(r"e_score_correction_bias|A_log|dt_bias|\.D$|(^|\.)bias$|norm")  # float32 in many a bf16 checkpoint
CARRIED = ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "preprocessor_config.json")
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "repetition_penalty": 1.05}
LAYER = {"jamba": 0, "diffllama": 5}  # that is removed, if not the fourth


def publish(folder: Path, family: str, **changes: object) -> Path:
    """A tiny model as its publisher would have: bf16 with float32 parts that bf16 cannot hold, and files beside it."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value + 1e-3 * torch.rand_like(value) if WIDE.search(name) else value.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in CARRIED:
        (folder / name).write_text("{}")
    for name in ("pytest.gguf", "quantize_config.json", "own_code.py", "README.md"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_published_checkpoint_round_trips(family: str, tmp_path: Path) -> None:
    teacher, layer = publish(tmp_path / "teacher", family), LAYER.get(family, 3)
    removal = remove_from_files(teacher, [layer], tmp_path / "short")
    before, after = stored_tensors(teacher), stored_tensors(tmp_path / "short")
    assert removal.carried  # and so it was copied from file to file
    originals = {b"".join(tensor.chunks()): tensor.dtype for tensor in before.values()}
    for name, tensor in after.items():
        assert originals.get(b"".join(tensor.chunks())) == tensor.dtype, f"{name} is not as it was published"
    config = json.loads((tmp_path / "short/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    carried = (*CARRIED, "generation_config.json", "tokenizer.json")
    assert all((tmp_path / "short" / name).read_bytes() == (teacher / name).read_bytes() for name in carried)
    assert not [path for path in (tmp_path / "short").iterdir() if path.suffix in (".gguf", ".py")]
    text = text_config(AutoConfig.from_pretrained(tmp_path / "short"))
    old = old_rotary_fields(text)
    assert all(config.get("text_config", config)[name] == value for name, value in old.items())
    assert (family in ONLY_NEW_ROTARY) == (bool(getattr(text, "rope_parameters", None)) and not old)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)  # as on any CPU
    remove_layers(model, [layer])
    kept = [index for index in range(6) if index != layer]
    save_model(model, tiny_tokenizer(), tmp_path / "saved", torch.bfloat16, origin_of(teacher).with_layers(kept))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "short" / name).read_bytes(), name
