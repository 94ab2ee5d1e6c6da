"""Saving a model: safetensors only, replaced atomically, loaded back and compared with the model in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import RunError
from layerpeel.model.config_check import first_difference
from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.files import replace_folder


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes a Hugging Face checkpoint in `dtype`; only the main process does.

    The checkpoint is written beside `folder`, loaded back and compared; then it replaces an older one at `folder`.

    Raises:
        RunError: the checkpoint loads as another model than the one in memory.
    """
    if not is_main_process():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    config_dtype = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(partial, state_dict=state)
    finally:
        model.config.dtype = config_dtype
    tokenizer.save_pretrained(partial)
    del state
    check_saved(model, partial, dtype)
    replace_folder(partial, folder)


def check_saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Checks that transformers loads from a folder the model in memory, rounded to `dtype`.

    Compares the classes, shapes and plain attributes of all modules, and all parameters and buffers bit by bit: a
    forward reads nothing else but the config and its input, so the logits are equal too. The second model is loaded on
    the CPU in `dtype`, and needs as much memory as saving did.

    Raises:
        RunError: they differ, or it cannot be loaded; the message names the folder and the first difference.
    """
    loader = type(model) if getattr(model.config, "auto_map", None) else AutoModelForCausalLM
    try:
        loaded, info = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
        unmatched = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        difference = f"other tensors ({', '.join(unmatched[:3])})" if unmatched else first_difference(loaded, model)
        difference = difference or _first_unequal_tensor(loaded, model)
    except Exception as error:  # transformers and remote code raise many types
        difference = f"an error ({' '.join(str(error).split())})"
    if difference:
        raise RunError(
            f"{folder}: the checkpoint that was just written loads with {difference}",
            hint="it is kept for inspection and must not be used; protect other layers (score.protect.layers), or "
            "report this with the model's config.json",
        )


def _first_unequal_tensor(loaded: PreTrainedModel, model: PreTrainedModel) -> str | None:
    loaded_tensors = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        stored = loaded_tensors.get(name)
        if stored is None or not torch.equal(tensor.detach().to("cpu", stored.dtype), stored):
            return f"another value of {name}"
    return None
