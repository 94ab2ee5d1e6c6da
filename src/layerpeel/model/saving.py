"""Saving a model: safetensors only, whole or not at all, loaded back and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layerpeel.errors import RunError
from layerpeel.model.config_check import first_difference
from layerpeel.processes.distributed import RANK
from layerpeel.storage.files import replace_folder


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes a Hugging Face checkpoint in `dtype`, whole or not at all.

    An older checkpoint at `folder` is replaced once the new one is complete, and was loaded back and compared. Of
    several processes the first writes.

    Raises:
        RunError: what was written is not the model in memory.
    """
    if RANK:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    running = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(partial, state_dict=state)
    finally:
        model.config.dtype = running
    tokenizer.save_pretrained(partial)
    del state
    check_saved(model, partial, dtype)
    replace_folder(partial, folder)


def check_saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Checks that what plain transformers loads from a folder is the model in memory, rounded to `dtype`.

    Compared are the classes, shapes and plain attributes of all modules, and all parameters and buffers, bit by bit:
    a forward reads nothing else but the config and its input, so equal parts give equal logits. The copy is loaded on
    the CPU in `dtype`, which takes the memory that saving took.

    Raises:
        RunError: they differ, or it cannot be loaded; the message names the folder and the first difference.
    """
    loader = type(model) if getattr(model.config, "auto_map", None) else AutoModelForCausalLM
    try:
        loaded, info = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
        odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        difference = f"other tensors ({', '.join(odd[:3])})" if odd else first_difference(loaded, model)
        difference = difference or _first_other_tensor(loaded, model)
    except Exception as error:  # whatever transformers, or the family's code, finds wrong with it
        difference = f"an error ({' '.join(str(error).split())})"
    if difference:
        raise RunError(
            f"{folder}: the checkpoint that was just written loads with {difference}",
            hint="it is kept for inspection and must not be used; protect other layers (score.protect.layers), or "
            "report this with the model's config.json",
        )


def _first_other_tensor(loaded: PreTrainedModel, model: PreTrainedModel) -> str | None:
    theirs = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for name, ours in [*model.named_parameters(), *model.named_buffers()]:
        other = theirs.get(name)
        if other is None or not torch.equal(ours.detach().to("cpu", other.dtype), other):
            return f"another value of {name}"
    return None
