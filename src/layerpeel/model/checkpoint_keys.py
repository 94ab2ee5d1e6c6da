"""Every tensor of a checkpoint has its place in the model, and every place its tensor; else it is said what it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.model.config_fields import text_config
from layerpeel.model.saved_config import MTP_COUNTERS

DEQUANTISE = "take the unquantised checkpoint (bf16 or fp16), or dequantise this one with the program that made it"
UNDONE = ("fp8", "mxfp4")  # quantisations that transformers undoes, as it calls them
# The last parts of the names that quantisers give what they store beside (or in place of) a weight.
QUANTISER_PARTS = re.compile(
    r"(?:^|[._])(?:(?:weight|input|output|k|v|q|kv|activation)_(?:global_)?scales?(?:_inv|_2)?|qweight|qzeros|scales"
    r"|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state(?:\..*)?|weight_packed|weight_shape|weight_zero_point"
    r"|input_zero_point|weight_g_idx|pre_quant_scale|weight_format|SCB|[a-z]*_?amax|w[123]_scale|zeros|scale_inv|W_q"
    r"|codebooks|smooth_scale)$"
)
ADAPTER_PARTS = re.compile(r"(?:^|\.)(?:lora_|ia3_|modules_to_save|base_layer|adapter|hada_|oft_|vera_|prompt_encoder)")
# Masks and positions that earlier versions of transformers stored, and that are computed now.
STORED_BEFORE = re.compile(
    r"(?:^|\.)(?:(?:attn|(?:self_?|cross)?attention|self_attn|crossattention)\.(?:bias|masked_bias|causal_mask|scale_attn)"
    r"|(?:rotary_emb|maybe_rotary|rotary)\.(?:inv_freq|(?:cos|sin)_cached)|embed_positions\.(?:weights|_float_tensor)"
    r"|position_ids|decoder\.version|alibi|attn_bias)$"
)
LAYER = re.compile(r"^(.*?[A-Za-z_]\w*)\.([0-9]+)\.")


def check_keys(info: Mapping[str, Any], config: PretrainedConfig, path: str | Path) -> None:
    """Checks what transformers says of a checkpoint it loaded.

    Args:
        info: its `loading_info`: the names of tensors that are missing, unexpected or of another shape.
        config: of the model.
        path: of the model, for the messages.

    Raises:
        InputError: a tensor has no place, or a place no tensor; it says what the names look like.
    """
    missing, unexpected = set(info["missing_keys"]), unexpected_tensors(info["unexpected_keys"], config)
    mismatched = sorted(info["mismatched_keys"])
    _check_quantiser(unexpected, config, path)
    _check_adapter(unexpected, path)
    _check_prefix(unexpected, missing, path)
    for name, stored, expected in mismatched:
        raise InputError(
            f"{path}: the weights do not fit config.json: {name} is of shape {list(stored)}, expected {list(expected)}",
            hint="take config.json and weights from the same checkpoint",
        )
    if missing:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(missing)[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    _check_depth(unexpected, config, path)
    if unexpected:
        raise InputError(
            f"{path}: the checkpoint holds tensors that its model has no place for: {_listed(unexpected)}",
            hint="take config.json and weights from the same checkpoint; if the model was saved within another one "
            "(with a value head, say), save the language model alone",
        )


def quantised_with(config: PretrainedConfig) -> str:
    """What a config says of how the weights are quantised; empty if it says nothing."""
    for section in (config, text_config(config)):
        fields = getattr(section, "quantization_config", None)
        if fields:
            fields = fields if isinstance(fields, dict) else fields.to_dict()
            return str(fields.get("quant_method") or fields.get("quant_algo") or "quantization_config")
    return ""


def check_not_quantised(model: PreTrainedModel, path: str | Path) -> None:
    """Checks that a model computes with weights that are no longer quantised.

    Raises:
        InputError: they still are, or the config says so and nothing was undone.
    """
    method = quantised_with(model.config)
    if method:
        raise InputError(
            f"{path}: the model is quantised (config.json says {method}), and stays so when it is loaded",
            hint="take the unquantised checkpoint (bf16 or fp16); if these weights are not quantised, take "
            "quantization_config out of config.json",
        )


def check_can_be_undone(config: PretrainedConfig, path: str | Path) -> None:
    """Checks by the config that weights are not quantised, or so that transformers gives the plain ones.

    Raises:
        InputError: they would stay quantised.
    """
    method = quantised_with(config)
    if method and method not in UNDONE:
        raise InputError(
            f"{path}: the model is quantised (config.json says {method}), which is not undone when it is loaded",
            hint="take the unquantised checkpoint (bf16 or fp16) of the same model",
        )


def predicts_further(name: str) -> bool:
    """Whether a tensor is of a module for multi-token prediction, which has layers of its own."""
    return any(part == "mtp" or part.startswith(("mtp_", "nextn_")) for part in name.split(".")[:3])


def unexpected_tensors(names: Iterable[str], config: PretrainedConfig) -> set[str]:
    """Of names without a place in the model, those that the model lacks.

    Modules that predict further tokens, and what earlier versions of transformers stored of masks and positions, are
    no part of it.
    """
    text = text_config(config)
    depth = text.num_hidden_layers
    further = max((getattr(text, name, 0) or 0 for name in MTP_COUNTERS), default=0)
    layers_beyond = range(depth, depth + further)
    return {
        name
        for name in names
        if not (predicts_further(name) or STORED_BEFORE.search(name) or _layer(name) in layers_beyond)
    }


def _check_quantiser(unexpected: Collection[str], config: PretrainedConfig, path: str | Path) -> None:
    scales = {name for name in unexpected if QUANTISER_PARTS.search(name)}
    if scales:
        method = quantised_with(config)
        named = f" (config.json says {method})" if method else ""
        raise InputError(
            f"{path}: the weights are quantised{named}, and transformers does not undo it: the checkpoint holds "
            f"scales that its model has no place for: {_listed(scales)}",
            hint=f"without scales the model would be another one; {DEQUANTISE}",
        )


def _check_adapter(unexpected: Collection[str], path: str | Path) -> None:
    parts = {name for name in unexpected if ADAPTER_PARTS.search(name)}
    if parts:
        raise InputError(
            f"{path}: the checkpoint holds an adapter that is not merged into the weights: {_listed(parts)}",
            hint="merge it with peft (model.merge_and_unload()) and save the result with save_pretrained",
        )


def _check_prefix(unexpected: Collection[str], missing: Collection[str], path: str | Path) -> None:
    """Explains names that are those of the model but for a prefix, such as `module.`."""
    if not unexpected or not missing:
        return
    for name in sorted(unexpected):
        for other in missing:
            longer, shorter = (name, other) if len(name) > len(other) else (other, name)
            if not longer.endswith(f".{shorter}"):
                continue
            prefix = longer.removesuffix(shorter)
            verb = "begin" if longer == name else "do not begin"
            raise InputError(
                f"{path}: the checkpoint's names {verb} with '{prefix}': it has {name} where the model has {other}",
                hint="it was saved within another module (torch.compile, DDP, a trainer); rename its tensors, or save "
                "the model itself with save_pretrained",
            )


def _check_depth(unexpected: Collection[str], config: PretrainedConfig, path: str | Path) -> None:
    depth = text_config(config).num_hidden_layers
    deepest = max(map(_layer, unexpected), default=-1)
    if deepest >= depth:
        raise InputError(
            f"{path}: the checkpoint holds layers 0 to {deepest}, and config.json says {depth} layers",
            hint="take config.json and weights from the same checkpoint, or remove layers with `layerpeel remove`",
        )


def _layer(name: str) -> int:
    """The number of the layer that a tensor is of; -1 if it is of none."""
    match = LAYER.match(name)
    return int(match[2]) if match else -1


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
