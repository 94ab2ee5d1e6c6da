"""Reads the weights of a model, all of them, and looks at what they give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from layerpeel.errors import InputError, reason_of
from layerpeel.model.checkpoint import check_weights, hint_for_weights
from layerpeel.model.checkpoint_keys import check_keys, check_not_quantised
from layerpeel.model.commits import cached_folder
from layerpeel.model.forward_switches import kernel_of, runnable_config
from layerpeel.processes.memory import memory_is_full
from layerpeel.processes.progress import console, shown


class WeightOptions(TypedDict):
    """How a model is made of its weights; see `load_model`."""

    dtype: torch.dtype
    trust_remote_code: bool
    attn_implementation: str


def load_weights(
    path: str | Path, config: PretrainedConfig, revision: str | None, options: WeightOptions, device: torch.device
) -> PreTrainedModel:
    """Loads a model with all of its weights: to a GPU tensor by tensor, for another device on the CPU.

    There, weights in the dtype of the checkpoint are mapped from its files, and processes share their memory.

    Raises:
        InputError: they are not in safetensors, do not fit the config, are incomplete, or stay quantised.
    """
    check_weights(config, path)
    try:
        with kernel_of(options["attn_implementation"], path) as kernel:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                config=runnable_config(config, announce=True),
                dtype=options["dtype"],
                use_safetensors=True,
                trust_remote_code=options["trust_remote_code"],
                revision=revision,
                device_map={"": device} if device.type == "cuda" else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kernel,
            )
    except InputError:
        raise
    except Exception as error:  # transformers and remote code raise many types
        if memory_is_full(error):
            raise
        raise InputError(
            f"{path}: the weights cannot be loaded ({reason_of(error)})", hint=hint_for_weights(config, path)
        ) from None
    if not os.path.isdir(path):
        check_weights(config, cached_folder(path, revision))  # the hub's files, which were not there before
    check_keys(info, config, path)
    check_not_quantised(model, path)
    return model


@torch.no_grad()
def check_finite(model: PreTrainedModel, path: str | Path) -> None:
    """Checks that the logits of one token are finite: most weights that are not make all of them NaN.

    Others, such as the embedding of a token or an expert, are named where a text first meets them.
    """
    logits = model(torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    if not torch.isfinite(logits).all():
        raise InputError(
            f"{path}: the model's outputs are no numbers: its weights hold NaN or infinity, or overflow {model.dtype}",
            hint="fetch the checkpoint again, or load it in another dtype",
        )


def note_float32(model: PreTrainedModel, path: str | Path) -> None:
    """Says that a model runs in float32 on a GPU."""
    if model.device.type == "cuda" and model.dtype is torch.float32:
        console.print(
            f"{shown(path)} is stored in float32, in which a GPU is several times slower and takes twice the memory: "
            "set dtype: bfloat16, unless that is meant",
            style="yellow",
            soft_wrap=True,
        )
