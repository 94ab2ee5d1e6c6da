"""The table of model families: where each keeps its layers and final norm, and which are refused.

This data and `config_fields` are all that the package knows of single families; `architecture` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Submodule names, relative to the base model, of a family's list of layers and its final norm."""

    layers: str = "layers"
    norm: str = "norm"
    base: str = ""
    """The base model's name in the causal model, if it is not the `base_model_prefix`."""
    note: str = ""
    """Which layers cannot be removed, or what is not exact, and why."""


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
}


# Families without removable layers, or that cannot be run layer by layer, and the reason that the checks find.
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
