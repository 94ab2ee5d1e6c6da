"""Loads models and tokenizers: safetensors only, checked against each other; remote code runs only on request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

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

from layerpeel.errors import InputError, reason_of
from layerpeel.model.adapters import Adapter, base_folder, checked_adapter
from layerpeel.model.adapters import merge_adapter as merge
from layerpeel.model.checkpoint import check_weights, hint_for_weights
from layerpeel.model.checkpoint_keys import check_keys
from layerpeel.model.commits import check_revision
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.model.forward_switches import check_attention, runnable_config
from layerpeel.model.vocabulary import check_vocabulary, check_vocabulary_size
from layerpeel.model.weights import WeightOptions, check_finite, load_weights, note_float32
from layerpeel.storage.hub import use_cache_without_hub
from layerpeel.storage.outputs import windows_hint

if TYPE_CHECKING:
    from layerpeel.config.run import RunConfig


class TeacherOptions(TypedDict, total=False):
    """How a model's files are read; see `load_model`."""

    trust_remote_code: bool
    revision: str | None
    merge_adapter: bool


def load_config_of(
    path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, merge_adapter: bool = False
) -> PretrainedConfig:
    """Loads the config of a causal language model, without its weights.

    Args:
        path: a folder or a hub name.
        trust_remote_code: whether code that comes with the checkpoint may run.
        revision: of a model on the hub; its default branch, if None.
        merge_adapter: whether the model is the base of an adapter, which will be merged into it.

    Raises:
        InputError: there is no such model, it is no causal language model, or has an adapter that is not to be merged.
    """
    check_revision(path, revision)
    use_cache_without_hub(path)
    adapter = checked_adapter(path, revision, merge=merge_adapter)
    if adapter and adapter.is_alone:
        path, revision = adapter.base, adapter.base_revision
        use_cache_without_hub(path)
    folder = Path(path)
    if os.path.isdir(path) and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained wrote, or a hub name",
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:
        if os.path.isdir(path):
            raise InputError(
                f"{folder / 'config.json'}: no config of a model that transformers knows ({reason_of(error)})",
                hint="take it from the model's publisher, or write it anew with save_pretrained; code that comes with "
                "a model runs only if it may (trust_remote_code: true in a config, --trust-remote-code)",
            ) from None
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"no such model: {path}{at} is neither a folder here nor a model that can be loaded from the hub "
            f"({reason_of(error)})",
            hint=windows_hint(path)
            or "check the path; for a hub model, check its name and revision, the network and your access to it",
        ) from None
    _check_causal(config, path)
    check_vocabulary_size(config, path)
    return config


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    merge_adapter: bool = False,
    attn_implementation: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer, and checks that they fit each other.

    Switches of the config that change what a forward returns (`output_attentions`, ...) are off in the model. On a
    CPU, weights in the dtype of the checkpoint are mapped from its files, so that processes share their memory; to a
    GPU they go tensor by tensor.

    Args:
        path: a folder or a hub name.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.
        revision: of a model on the hub; its default branch, if None.
        merge_adapter: whether to merge the adapter that is in the folder into the weights.
        attn_implementation: the kernel of attention, as transformers calls it, or `auto`.

    Raises:
        InputError: no such model, device or kernel, no causal language model; weights that are missing, without a place
            in the model, quantised or not in safetensors; an adapter that is not merged; or a tokenizer with more
            entries than the model's vocabulary.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code, revision=revision, merge_adapter=merge_adapter)
    target = pick_device(device)
    wanted = wanted_dtype(config, target, dtype)
    check_attention(attn_implementation, target, wanted)
    options = WeightOptions(dtype=wanted, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation)
    if adapter := checked_adapter(path, revision, merge=merge_adapter):
        model = _load_merged(adapter, config, path, revision, options)
    else:
        model = load_weights(path, config, revision, options, target)
    tokenizer = load_tokenizer(
        path, trust_remote_code=trust_remote_code, revision=revision, merge_adapter=merge_adapter
    )
    check_vocabulary(model, tokenizer, path)
    return _ready(model, target, path, warn=dtype == "auto"), tokenizer


def _ready(model: PreTrainedModel, target: torch.device, path: str | Path, *, warn: bool) -> PreTrainedModel:
    """The model on its device, in evaluation mode, its weights checked; a warning where float32 is slow there."""
    model = model.to(target).eval()
    check_finite(model, path)
    if warn:
        note_float32(model, path)
    return model


def _load_merged(
    adapter: Adapter, config: PretrainedConfig, path: str | Path, revision: str | None, options: WeightOptions
) -> PreTrainedModel:
    """Loads the base of an adapter, on the CPU, and merges the adapter into it."""
    base_revision = adapter.base_revision if adapter.is_alone else revision
    with base_folder(adapter) as base:
        model = load_weights(base, config, base_revision, options, torch.device("cpu"))
    model = merge(model, adapter, revision)
    model.config._name_or_path = model.name_or_path = str(path)
    return model


def load_without_bytes(
    folder: Path,
    config: PretrainedConfig,
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """What transformers makes of a checkpoint, on the meta device; refuses what `load_model` would, by the headers.

    Args:
        folder: with the checkpoint.
        config: from `load_config_of`.
        path: what messages call it.

    Raises:
        InputError: the weights do not fit the config, or are incomplete.
    """
    check_weights(config, folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=runnable_config(config),
            dtype=dtype,
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers and remote code raise many types
        raise InputError(
            f"{path}: the weights cannot be loaded ({reason_of(error)})", hint=hint_for_weights(config, path)
        ) from None
    check_keys(info, config, path)
    return model


def load_teacher(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the teacher of a run's config; see `load_model`."""
    return load_model(
        config.teacher,
        device=config.device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        **teacher_options(config),
    )


def teacher_options(config: RunConfig) -> TeacherOptions:
    """What a run's config says of how its teacher is read, as keyword arguments of the functions here."""
    return TeacherOptions(
        trust_remote_code=config.trust_remote_code, revision=config.revision, merge_adapter=config.merge_adapter
    )


def load_teacher_config(config: RunConfig) -> PretrainedConfig:
    """Loads the config of a run's teacher; see `load_config_of`."""
    return load_config_of(config.teacher, **teacher_options(config))


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, merge_adapter: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the hub; that of the base, where an adapter comes without one.

    Raises:
        InputError: there is none.
    """
    places = [(str(path), revision)]
    if merge_adapter and (adapter := checked_adapter(path, revision, merge=True)) and adapter.is_alone:
        places.append((adapter.base, adapter.base_revision))
    error: Exception | None = None
    for place, at in places:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, revision=at)
        except Exception as failure:
            error = error or failure
    raise InputError(
        f"{path}: no tokenizer can be loaded ({reason_of(error or Exception())})",
        hint="save the tokenizer beside the model",
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
