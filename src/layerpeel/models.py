"""Loading and saving teacher, student and tokenizer: safetensors only, nothing executed unless asked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

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

from layerpeel.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: CUDA, then MPS, then CPU, unless one is named."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError:
            raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_config_of(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a causal language model, before its weights are read.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained wrote, or a hub name",
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no such model: {path} is neither a folder here nor a model that can be loaded from the hub ({reason})",
            hint="check the path; for a hub model, check its name, the network and your access to it",
        ) from None
    _check_causal(config, path)
    return config


def load_model(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer, checked against each other.

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
    wanted = DTYPES.get(dtype) or (torch.float32 if target.type == "cpu" else config.dtype or torch.float32)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"{path}: the weights cannot be loaded ({str(error).splitlines()[0]})",
            hint="only safetensors are read; convert other formats with save_pretrained",
        ) from None
    if info["missing_keys"]:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(info['missing_keys'])[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return model.to(target).eval(), tokenizer


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the hub.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: no tokenizer can be loaded ({reason})", hint="save the tokenizer beside the model"
        ) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Checks that every token has an embedding (a larger embedding is padding, and fine).

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


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint is stored in, by its config (float32 if it does not say)."""
    return load_config_of(path).dtype or torch.float32


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes a Hugging Face checkpoint in `dtype`, whole or not at all.

    An older checkpoint at `folder` is replaced once the new one is complete.
    """
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
    replace_folder(partial, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, or of none."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_causal(config: PretrainedConfig, path: str | Path) -> None:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or []
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not custom and (known is None or (named and not causal & set(named))):
        raise InputError(
            f"{path} is not a causal language model: it is a {', '.join(named) or config.model_type}",
            hint="layerpeel works on decoders that AutoModelForCausalLM loads, such as Llama or Qwen",
        )
