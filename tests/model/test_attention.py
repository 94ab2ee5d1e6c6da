"""`attn_implementation`: the kernel that is named runs, or the error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model import forward_switches
from layerpeel.model.forward_switches import attention_of, check_attention
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import load_streamed
from tests.families import save_tiny, tiny_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_kernel_that_is_named_runs(tmp_path: Path) -> None:
    folder, ids = save_tiny(tmp_path / "model"), tiny_ids()
    models = {name: load_model(folder, attn_implementation=name)[0] for name in ("auto", "eager", "sdpa")}
    assert {name: attention_of(model.config) for name, model in models.items()} == {
        "auto": "sdpa",
        "eager": "eager",
        "sdpa": "sdpa",
    }
    streamed, _ = load_streamed(folder, attn_implementation="eager")
    assert attention_of(streamed.model.config) == "eager"
    eager = LayerwiseModel(models["eager"]).forward_with_skips(ids)
    assert torch.equal(LayerwiseModel(streamed.model, streamed.weights_loaded).forward_with_skips(ids), eager)
    torch.testing.assert_close(LayerwiseModel(models["sdpa"]).forward_with_skips(ids), eager)


@pytest.mark.parametrize("load", [load_model, load_streamed])
@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("spda", "attn_implementation: unknown kernel 'spda'; did you mean 'sdpa'?", "use auto, and"),
        ("flex_attention", "attn_implementation: unknown kernel 'flex_attention'; ", "use auto, and"),
        (
            "flash_attention_2",
            "attn_implementation: flash_attention_2 runs on CUDA devices in 16 bits, not on cpu in float32",
            "use auto, or dtype: bfloat16 on a GPU",
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(load, name: str, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(save_tiny(tmp_path / "model"), attn_implementation=name)
    assert str(caught.value).startswith(message) and str(caught.value.hint).startswith(hint)


def test_a_kernel_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(forward_switches, name, lambda: False)
    for name in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(InputError, match=f"attn_implementation: {name} is not installed"):
            check_attention(name, CUDA, torch.bfloat16)
    monkeypatch.setattr(forward_switches, "is_flash_attn_3_available", lambda: True)
    check_attention("flash_attention_3", CUDA, torch.bfloat16)


@pytest.mark.parametrize("load", [load_model, load_streamed])
def test_a_family_that_lacks_the_kernel_says_so(load, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bloom")
    with pytest.raises(InputError) as caught:
        load(folder, attn_implementation="sdpa")
    assert str(caught.value).startswith(f"attn_implementation: {folder} does not run with sdpa (")
    assert caught.value.hint == "use auto, or eager"


def test_flash_takes_no_masks_of_trees(tmp_path: Path) -> None:
    model, _ = load_model(save_tiny(tmp_path / "model"))
    assert LayerwiseModel(model).runs_trees
    model.config._attn_implementation_internal = "flash_attention_2"
    assert not LayerwiseModel.runs_trees.func(_NeverRuns(model))


class _NeverRuns:
    """A model that may not be run to find out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.vocab_size = model, 64
