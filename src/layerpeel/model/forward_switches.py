"""Switches of a config that change what a forward returns, or ask for a kernel that is not installed."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

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
        return bool(is_flash_attn_2_available())
    if attention.startswith(("flex_attention", "paged|")):  # no gradients on a CPU; a cache of its own
        return False
    return attention == "eager" or attention in ALL_ATTENTION_FUNCTIONS.valid_keys()
