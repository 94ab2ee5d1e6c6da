"""A model that a config describes, without a checkpoint's weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from layerpeel.model.forward_switches import runnable_config


def build_model(
    config: PretrainedConfig, dtype: torch.dtype | None = None, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Builds a model, with random weights, or with none in a context that makes it so (`init_empty_weights`).

    Args:
        config: stays as it is.
        dtype: the config's if not given.
        trust_remote_code: whether code that comes with the checkpoint may run; without a default, as the model that is
            built must be of the class that `load_model` would take.
    """
    options = {} if dtype is None else {"dtype": dtype}
    config = runnable_config(config)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options).eval()
