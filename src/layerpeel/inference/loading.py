"""Loads a teacher to be run layer by layer, with its layers in memory or on the disk."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_teacher
from layerpeel.model.streaming import load_streamed


def load_layerwise(config: RunConfig, *, stream: bool) -> tuple[LayerwiseModel, PreTrainedTokenizerBase]:
    """Loads a config's teacher; see `load_model`.

    Args:
        stream: each layer is read from the checkpoint as it runs, and dropped again.

    Raises:
        InputError: the model will not do, or its layers cannot be read one by one.
    """
    if not stream:
        model, tokenizer = load_teacher(config)
        return LayerwiseModel(model), tokenizer
    if config.merge_adapter:
        raise InputError(
            "merge_adapter: an adapter cannot be merged into layers that are read one at a time",
            hint="use weights: memory, or merge it with peft and save the result",
        )
    streamed, tokenizer = load_streamed(
        config.teacher,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        attn_implementation=config.attn_implementation,
    )
    return LayerwiseModel(streamed.model, streamed.weights_loaded, streamed.drop_read_ahead), tokenizer
