"""An adapter (LoRA) beside a model or in its place: refused, or merged into the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerpeel.errors import InputError
from layerpeel.model.digests import digests, fingerprint
from layerpeel.model.loading import load_config_of, load_model
from layerpeel.model.removal import remove_from_files
from layerpeel.model.streaming import load_streamed
from layerpeel.model.surgery import remove_layers
from tests.families import save_tiny, tiny_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about names in transformers


def add_adapter(base: Path, folder: Path) -> torch.Tensor:
    """Saves a random adapter of a model in a folder; gives the logits of the model with it."""
    model, _ = load_model(base, device="cpu")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"base_model_name_or_path": str(base)}))
    logits: torch.Tensor = wrapped.eval()(tiny_ids()).logits
    return logits.detach()


@pytest.fixture(params=["beside", "alone"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter, beside its base or without it, and the logits of the adapted model."""
    base = save_tiny(tmp_path / "base")
    folder = base if request.param == "beside" else tmp_path / "adapter"
    return folder, add_adapter(base, folder)


def test_an_adapter_is_refused_unless_it_is_to_be_merged(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = adapted
    for read in (load_config_of, load_model, load_streamed, lambda path: remove_from_files(path, [2], tmp_path / "s")):
        with pytest.raises(InputError, match=r"adapter.* .adapter_config\.json., which is not merged") as caught:
            read(folder)
        assert "merge_adapter: true" in str(caught.value.hint) and "--merge-adapter" in str(caught.value.hint)


def test_a_merged_adapter_computes_what_peft_does(adapted: tuple[Path, torch.Tensor]) -> None:
    folder, expected = adapted
    model, _ = load_model(folder, device="cpu", merge_adapter=True)
    torch.testing.assert_close(model(tiny_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_layers_are_removed_from_the_merged_model(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = adapted
    expected = remove_layers(load_model(folder, device="cpu", merge_adapter=True)[0], [2])(tiny_ids()).logits
    remove_from_files(folder, [2], tmp_path / "student", merge_adapter=True)
    assert not list((tmp_path / "student").glob("adapter*"))
    assert torch.equal(load_model(tmp_path / "student", device="cpu")[0](tiny_ids()).logits, expected)


def test_an_adapter_of_another_model_is_refused(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = adapted
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match=r"the adapter cannot be merged into .*tensors without their place"):
        load_model(folder, device="cpu", merge_adapter=True)


def test_without_an_adapter_there_is_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="merge_adapter: there is no adapter in"):
        load_model(save_tiny(tmp_path), device="cpu", merge_adapter=True)


def test_without_peft_it_says_what_to_install(
    adapted: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpeel.model.adapters.find_spec", lambda name: None)
    with pytest.raises(InputError, match="peft is not installed") as caught:
        load_model(adapted[0], device="cpu", merge_adapter=True)
    assert caught.value.hint == "pip install 'layerpeel[peft]'"


def test_a_changed_base_is_noticed(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    add_adapter(base, tmp_path / "adapter")
    before, key = digests(tmp_path / "adapter"), fingerprint(tmp_path / "adapter", torch.float32)
    assert {"adapter_model.safetensors", "base model.safetensors"} <= before.keys()
    save_tiny(base, "qwen2")
    now = digests(tmp_path / "adapter")
    assert [name for name in now if now[name] != before.get(name)] == ["base config.json", "base model.safetensors"]
    assert fingerprint(tmp_path / "adapter", torch.float32) != key
