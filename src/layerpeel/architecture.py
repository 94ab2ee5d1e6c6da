"""All that is known of model families: where their layers and final norms are, and which config fields are per layer.

A family is a row of `FAMILIES`. A family without a row works too, if its layers can be found without doubt. Either
way, `expressible` refuses what a config cannot express, and `calls` what cannot be run layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layerpeel.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, as names below its base model; with dots where they are further down."""

    layers: str = "layers"
    norm: str = "norm"
    base: str = ""
    """Where the causal model keeps its base model, if not under its `base_model_prefix`."""
    note: str = ""
    """What of it stays, or is not exact, and why."""


_PLAIN = Family()
_FINAL_LAYERNORM = Family(norm="final_layernorm")
_EMBEDDING_NORM = Family(norm="embedding_norm")
_GPT2 = Family(layers="h", norm="ln_f")
_MAMBA = Family(norm="norm_f")
_SPARSE = Family(note="scoring and training are exact for texts of up to index_topk tokens; removal is exact")
_LAST_OF_A_KIND = Family(note="the last layer of each kind of attention stays: the config derives its KV sharing")
_PLAIN_FAMILIES = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2
    deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text glm glm4
    glm4_moe glm4_moe_lite gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 inkling_text jetmoe laguna lara_mini llama mellum mimo_v2_flash
    minimax_m2 ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmo_hybrid olmoe phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next sarvam_mla sarvam_moe seed_oss smollm3
    solar_open stablelm starcoder2 vaultgemma youtu
"""
FAMILIES = {name: _PLAIN for name in _PLAIN_FAMILIES.split()} | {
    "axk2": _SPARSE,
    "bamba": _FINAL_LAYERNORM,
    "biogpt": Family(norm="layer_norm"),
    "bloom": _GPT2,
    "codegen": _GPT2,
    "ctrl": Family(layers="h", norm="layernorm"),
    "dbrx": Family(layers="blocks", norm="norm_f"),
    "deepseek_v32": _SPARSE,
    "diffllama": Family(note="only the last layers can go: what a layer subtracts depends on its index"),
    "falcon": _GPT2,
    "falcon_h1": _FINAL_LAYERNORM,
    "falcon_mamba": _MAMBA,
    "gemma3": Family(layers="language_model.layers", norm="language_model.norm"),
    "gemma4_text": _LAST_OF_A_KIND,
    "gemma4_unified_text": _LAST_OF_A_KIND,
    "gpt-sw3": _GPT2,
    "gpt2": Family(layers="h", norm="ln_f", note="with scale_attn_by_inverse_layer_idx only the last layers can go"),
    "gpt_bigcode": _GPT2,
    "gpt_neo": _GPT2,
    "gpt_neox": Family(norm="final_layer_norm"),
    "gpt_neox_japanese": Family(norm="final_layer_norm", note="the last layer stays: it alone has a bias"),
    "gptj": _GPT2,
    "jamba": Family(
        norm="final_layernorm", note="layers stay without which the periods of attention or experts would break"
    ),
    "lfm2": _EMBEDDING_NORM,
    "lfm2_moe": _EMBEDDING_NORM,
    "lfm3": _EMBEDDING_NORM,
    "llama4_text": Family(base="model"),
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "modernbert-decoder": Family(norm="final_norm", note="the first layer stays: it alone has no first norm"),
    "mpt": Family(layers="blocks", norm="norm_f"),
    "nemotron_h": _MAMBA,
    "opt": Family(
        norm="final_layer_norm", base="model.decoder", note="those with a projection after the layers are refused"
    ),
    "persimmon": _FINAL_LAYERNORM,
    "phi": _FINAL_LAYERNORM,
    "recurrent_gemma": Family(norm="final_norm"),
    "xglm": Family(norm="layer_norm"),
}  # fmt: skip

# Families of which no layer can go, or that cannot be run layer by layer: what the checks find, in words.
REFUSED = {
    "cpmant": "its layers are inside an encoder of its own",
    "deepseek_v4": "its layers hand on several streams of hidden states",
    "dory": "it runs layers in loops, and mixes their results",
    "gemma3n_text": "its layers hand on several streams of hidden states, and embeddings outside them are per layer",
    "glm_moe_dsa": "its layers hand on the tokens that they chose to attend to",
    "hrm_text": "it runs stacks of layers in loops",
    "hy_v4": "its layers hand on several streams of hidden states",
    "longcat_flash": "each of its layers counts as two",
    "minicpm3": "what its layers add is scaled by the depth of the model",
    "minimax": "the decay of its linear attention depends on the depth of the model",
    "nanochat": "it subtracts the hidden states of a middle layer from the last",
    "openai-gpt": "it has no final norm",
    "rwkv": "it rescales hidden states and weights every few layers",
    "zamba2": "its layers share their weights",
    "zaya": "its layers hand on the choices of their routers",
}

# Config fields, in whatever family they occur.
PER_LAYER_LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types", "attention_layers",
    "layer_rope_theta", "num_attention_heads_per_layer", "intermediate_size", "activation_sparsity_pattern",
)  # fmt: skip
REPEATED_LISTS = ("block_types",)  # a pattern that is repeated over the layers
RUN_LISTS = ("attention_types",)  # [[kinds, repeats], ...]
LAYER_COUNTERS = (  # "the first n layers are ..."
    "max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
)  # fmt: skip
LAST_INDICES = ("moe_layer_end_index",)  # "the layers up to this index are ..."
LAST_COUNTERS = ("num_kv_shared_layers",)  # "the last n layers are ..."
LAYER_INDEX_LISTS = (  # "the layers with these indices are ..."
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "local_layer_ids",
)  # fmt: skip
PERIODS = (  # "the layers whose index divided by the period leaves the offset are ..."
    ("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"),
)  # fmt: skip

# Attributes by which a module knows its layer's place, such as where its part of the KV cache is.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")

# Attributes outside the layers that follow from the config's lists.
LIST_ATTRIBUTES = ("has_sliding_layers",)

# Fields that limit how far back a layer attends.
ATTENTION_REACHES = ("sliding_window", "attention_chunk_size", "window_size")

FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Architecture:
    """The parts of one causal language model."""

    base: nn.Module
    base_name: str
    family: Family

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.get_submodule(self.family.layers)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so the input has to be."""
        return next(self.base.parameters()).device

    def set_layers(self, layers: list[nn.Module] | nn.ModuleList) -> None:
        parent, _, name = self.family.layers.rpartition(".")
        setattr(
            self.base.get_submodule(parent),
            name,
            layers if isinstance(layers, nn.ModuleList) else nn.ModuleList(layers),
        )

    @property
    def norm(self) -> nn.Module:
        return self.base.get_submodule(self.family.norm)

    def layer_prefix(self) -> str:
        """The name of the layer list in the causal model's state dict, such as `model.layers`."""
        return f"{self.base_name}.{self.family.layers}"


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Finds the layers and the final norm of a causal language model.

    Raises:
        InputError: the family has no row, and its layers or norm cannot be found without doubt; or it has one, and
            this model of it lacks a part.
    """
    family = FAMILIES.get(model.config.model_type) or _guess_family(model)
    name = family.base or model.base_model_prefix
    architecture = Architecture(model.get_submodule(name), name, family)
    for part in (family.layers, family.norm):
        try:
            found = isinstance(architecture.base.get_submodule(part), nn.Module)
        except AttributeError:
            found = False
        if not found:
            raise InputError(
                f"this {model.config.model_type} model has no {name}.{part}, so it cannot be run layer by layer",
                hint="models of this family with a final norm are supported",
            )
    return architecture


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model: all of it, unless the model reads images or sound too."""
    return config.get_text_config(decoder=True)


def attention_reach(config: PretrainedConfig) -> int | None:
    """Tokens that the shortest-sighted layer attends to; None if every layer sees all before."""
    reaches = [getattr(text_config(config), name, None) for name in ATTENTION_REACHES]
    return min((reach for reach in reaches if isinstance(reach, int)), default=None)


def shortened_fields(config: PretrainedConfig, kept: list[int]) -> dict[str, Any]:
    """The config fields that change when only the layers `kept` (indices, ascending) stay, with their new values.

    Args:
        config: of the language model itself (`text_config`).
    """
    total, own = config.num_hidden_layers, vars(config)
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER_LISTS:
        values = own.get(name)
        if isinstance(values, (list, tuple)) and len(values) == total:
            fields[name] = [values[index] for index in kept]
    for name in REPEATED_LISTS:
        if pattern := own.get(name):
            fields[name] = [pattern[index % len(pattern)] for index in kept]
    for name in RUN_LISTS:
        if runs := own.get(name):
            kinds = [kind for pattern, repeats in runs for _ in range(repeats) for kind in pattern]
            fields[name] = [[[kinds[index]], 1] for index in kept]
    for name in LAYER_COUNTERS:
        count = own.get(name)
        if isinstance(count, int) and count < total:  # a larger count means all layers, and still does
            fields[name] = sum(index < count for index in kept)
    for name in LAST_INDICES:
        if name in own:
            fields[name] = sum(index <= own[name] for index in kept) - 1
    for name in LAST_COUNTERS:
        if count := own.get(name):
            fields[name] = sum(index >= total - count for index in kept)
    if (step := own.get("decoder_sparse_step") or 1) > 1:  # the list says the same of any layers, and the step does not
        dense = {index for index in range(total) if (index + 1) % step}
        own = own | {"mlp_only_layers": sorted(dense.union(own.get("mlp_only_layers") or ()))}
        fields["decoder_sparse_step"] = 1
    for name in LAYER_INDEX_LISTS:
        if indices := own.get(name):
            fields[name] = [position for position, index in enumerate(kept) if index in indices]
    for period, offset in PERIODS:
        if period in own:
            fields |= _shortened_period(kept, own, period, offset)
    if overrides := config.to_dict().get("per_layer_config"):  # by layer, whose index is written as a word
        own_to = {int(index): values for index, values in overrides.items()}
        fields["per_layer_config"] = {p: own_to[index] for p, index in enumerate(kept) if index in own_to}
    return fields


def _shortened_period(kept: list[int], own: dict[str, Any], period: str, offset: str) -> dict[str, int]:
    """The period and offset that choose the same ones among the layers `kept`; none if there are no such numbers."""
    chosen = [index % own[period] == own[offset] for index in kept]
    for length in (own[period], *range(1, len(kept) + 2)):
        for first in range(length):
            if chosen == [position % length == first for position in range(len(kept))]:
                return {period: length, offset: first}
    return {}


def _guess_family(model: PreTrainedModel) -> Family:
    base, total = model.base_model, getattr(model.config, "num_hidden_layers", None)
    lists = [n for n, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m) == total]
    norms = [n for n, _ in base.named_children() if n in FINAL_NORM_NAMES]
    if len(lists) != 1 or len(norms) != 1:
        raise InputError(
            f"model family '{model.config.model_type}' is not known, and its layers cannot be found without doubt: "
            f"expected one list of {total} layers and one final norm in {type(base).__name__}, "
            f"found lists {lists} and norms {norms}",
            hint="`layerpeel families` lists the families with a row of their own",
        )
    return Family(layers=lists[0], norm=norms[0])
