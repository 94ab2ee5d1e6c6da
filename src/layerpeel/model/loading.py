"""Loads models and tokenizers: safetensors only, checked against each other; remote code runs only on request."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, reason_of
from layerpeel.model.checkpoint import check_weights
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.storage.outputs import windows_hint


def load_config_of(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads the config of a causal language model, without its weights.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    folder = Path(path)
    if os.path.isdir(path) and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained wrote, or a hub name",
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if os.path.isdir(path):
            raise InputError(
                f"{folder / 'config.json'}: no config of a model that transformers knows ({reason_of(error)})",
                hint="take it from the model's publisher, or write it anew with save_pretrained; code that comes with "
                "a model runs only with trust_remote_code: true",
            ) from None
        raise InputError(
            f"no such model: {path} is neither a folder here nor a model that can be loaded from the hub "
            f"({reason_of(error)})",
            hint=windows_hint(path)
            or "check the path; for a hub model, check its name, the network and your access to it",
        ) from None
    _check_causal(config, path)
    return config


def load_model(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer, and checks that they fit each other.

    Args:
        path: a folder or a hub name.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: no such model, no causal language model, weights missing or not in safetensors, or a tokenizer
            with more entries than the model's vocabulary.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code)
    target = pick_device(device)
    check_weights(config, path)
    model = _load_weights(path, wanted_dtype(config, target, dtype), trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    model = model.to(target).eval()
    _check_finite(model, path)
    return model, tokenizer


def _load_weights(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Loads a model with all of its weights, on the CPU.

    Raises:
        InputError: they are not in safetensors, do not fit the config, or are incomplete.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers and remote code raise many types
        raise InputError(
            f"{path}: the weights cannot be loaded ({reason_of(error)})",
            hint="only safetensors that fit config.json are read; convert other formats with save_pretrained",
        ) from None
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{path}: the weights do not fit config.json: {name} is of shape {list(stored)}, expected {list(expected)}",
            hint="take config.json and weights from the same checkpoint",
        )
    if info["missing_keys"]:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(info['missing_keys'])[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    return model


def load_teacher(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the teacher of a run's config; see `load_model`."""
    return load_model(
        config.teacher, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the hub.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"{path}: no tokenizer can be loaded ({reason_of(error)})", hint="save the tokenizer beside the model"
        ) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Checks that every token id has an embedding; more embeddings than tokens are padding.

    Raises:
        InputError: the tokenizer's ids go beyond the model's vocabulary.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{path}: tokenizer and model have different vocabularies: the tokenizer's ids go up to {largest}, "
            f"the model embeds {rows} tokens (0 to {rows - 1})",
            hint="use the tokenizer that the model was trained with",
        )


@torch.no_grad()
def _check_finite(model: PreTrainedModel, path: str | Path) -> None:
    """Checks that the logits of one token are finite: any weight that is not makes all of them NaN."""
    logits = model(torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    if not torch.isfinite(logits).all():
        raise InputError(
            f"{path}: the model's outputs are no numbers: its weights hold NaN or infinity, or overflow {model.dtype}",
            hint="fetch the checkpoint again, or load it in another dtype",
        )


def _check_causal(config: PretrainedConfig, path: str | Path) -> None:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or []
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not custom and (class_name is None or (named and not causal & set(named))):
        raise InputError(
            f"{path} is not a causal language model: it is a {', '.join(named) or config.model_type}",
            hint="layerpeel works on decoders that AutoModelForCausalLM loads, such as Llama or Qwen",
        )
