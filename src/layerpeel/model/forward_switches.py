"""Switches of a config that change what a forward returns, or ask for a kernel that is not installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from layerpeel.errors import InputError, nearest, reason_of
from layerpeel.model.config_fields import text_config
from layerpeel.processes.progress import console, shown

# What a forward has to return here: logits under their name, a KV cache on request, and nothing else.
SWITCHES = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
    "torchscript": False,
}


def runnable_config(config: PretrainedConfig, *, announce: bool = False) -> PretrainedConfig:
    """A copy of a config to run its model with: without switches that change what a forward returns.

    Where a config asks for a kernel of attention that does not run here, transformers' own choice is taken.

    Args:
        config: stays as it is, to be saved as its publisher wrote it.
        announce: whether to say that another kernel is taken.
    """
    runnable = copy.deepcopy(config)
    sections = [runnable, text_config(runnable)]
    for section in sections:
        _take_installed_attention(section, announce)
        for name, value in SWITCHES.items():
            held = f"_{name}" if f"_{name}" in vars(section) else name
            if held in vars(section):
                vars(section)[held] = value
    return runnable


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Checks the kernel of attention that a user names.

    Raises:
        InputError: there is no such kernel, it is not installed, or does not run on the device or in the dtype.
    """
    names = {"auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    names = {kernel for kernel in names if not kernel.startswith(("flex_attention", "paged|"))}  # see `_runs_here`
    if name not in names:
        raise InputError(
            f"attn_implementation: unknown kernel '{name}'{nearest(name, names)}",
            hint="use auto, and transformers chooses",
        )
    if not name.startswith("flash_attention"):
        return
    if device.type != "cuda" or dtype is torch.float32:
        raise InputError(
            f"attn_implementation: {name} runs on CUDA devices in 16 bits, not on {device.type} in "
            f"{str(dtype).removeprefix('torch.')}",
            hint="use auto, or dtype: bfloat16 on a GPU",
        )
    if not _runs_here(name):
        raise InputError(
            f"attn_implementation: {name} is not installed", hint="install flash-attn, or use auto or sdpa"
        )


@contextmanager
def kernel_of(name: str, path: str | Path) -> Iterator[dict[str, str]]:
    """The options with which transformers makes a model that runs a kernel of attention; none for `auto`.

    Raises:
        InputError: the model's family lacks it.
    """
    try:
        yield {} if name == "auto" else {"attn_implementation": name}
    except ValueError as error:
        if name == "auto" or "attn_implementation" not in str(error):
            raise
        raise InputError(
            f"attn_implementation: {path} does not run with {name} ({reason_of(error)})", hint="use auto, or eager"
        ) from None


def attention_of(config: PretrainedConfig) -> str:
    """The kernel of attention that a loaded model runs."""
    return str(getattr(text_config(config), "_attn_implementation", None) or "eager")


def _take_installed_attention(config: PretrainedConfig, announce: bool) -> None:
    wanted = getattr(config, "_attn_implementation", None)
    if not isinstance(wanted, str) or _runs_here(wanted):
        return
    config._attn_implementation = None
    if announce:
        console.print(
            f"config.json asks for {shown(wanted)}, which is not installed or not for this use: attention runs without "
            "it",
            soft_wrap=True,
        )


def _runs_here(attention: str) -> bool:
    """Whether a kernel of attention is there, and runs with and without gradients on any device."""
    if attention.startswith("flash_attention"):
        return bool(is_flash_attn_3_available() if attention.endswith("3") else is_flash_attn_2_available())
    if attention.startswith(("flex_attention", "paged|")):  # no gradients on a CPU; a cache of its own
        return False
    return attention == "eager" or attention in ALL_ATTENTION_FUNCTIONS.valid_keys()
