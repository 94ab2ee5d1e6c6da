"""Tiny random models of each family, and a tokenizer for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, VOCABULARY = 6, 64
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# By the names that families have for them; a config gets those that it knows.
SMALL: dict[str, Any] = IDS | {
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], LAYERS),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "dff", "intermediate_size_mlp", "ffn_hidden_size"], 48),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["swa_num_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "swa_v_head_dim", "v_head_dim", "linear_key_head_dim"], 8),
    **dict.fromkeys(["linear_value_head_dim", "kv_lora_rank", "q_lora_rank", "index_head_dim", "kv_channels"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "ssm_state_size"], 8),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "hidden_size_per_layer_input", "window_size"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "index_topk"], 64),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "rotary_dim"], 4),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "qk_head_dim"], 16),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "first_k_dense_replace", "num_dense_layers"], 2),
    **dict.fromkeys(["n_group", "topk_group", "mamba_n_groups", "n_groups"], 1),
    "mamba_d_ssm": 64,
    "use_mamba_kernels": False,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * (LAYERS // 3)}
LATENT = {"num_key_value_heads": 4}  # latent attention has no groups
GEMMA4 = {"hidden_size_per_layer_input": 0, "global_head_dim": 16} | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
}

RECURRENT = [
    *("mamba", "mamba2", "falcon_mamba", "bamba", "falcon_h1", "qwen3_next", "qwen3_5_text", "granitemoehybrid"),
    *("jamba", "lfm2", "nemotron_h", "olmo_hybrid"),
]
# The families that every test runs on: one of each kind.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {},
    "gemma2": ALTERNATING | {"final_logit_softcapping": 3.0},
    "gemma3_text": ALTERNATING,
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "gpt2": {"n_inner": None},
    "gpt_neox": {},
    "smollm3": {"no_rope_layer_interval": 2, "sliding_window": None},
    "cohere2": ALTERNATING | {"logit_scale": 0.25},
    "starcoder2": {"sliding_window": None},
}
# Families without a row of their own: found by their modules.
UNLISTED: dict[str, dict[str, Any]] = {"iquestcoder": {}, "jais2": {}}
# What others need beyond SMALL.
OTHERS = {
    **dict.fromkeys(["axk1", "longcat_flash", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla"], LATENT),
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa", "minicpm3"], LATENT),
    **dict.fromkeys(["granitemoehybrid", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text"], HYBRID),
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], GEMMA4),
    "bamba": {"attn_layer_indices": [1, 4]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "exaone4": ALTERNATING,
    "falcon": {"alibi": True},
    "gemma3": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 61,
        "boi_token_index": 62,
        "eoi_token_index": 63,
    },
    "gemma3n_text": ALTERNATING | {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "mamba2": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] + ["full_attention"] * 2},
    "olmo3": ALTERNATING,
    "qwen2_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [5]},
    "qwen3_next": HYBRID | {"decoder_sparse_step": 2},
    "youtu": LATENT | {"pad_token_id": None},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """A small config of a family, by its `model_type`."""
    kind = CONFIG_MAPPING[family]
    fields = (FAMILIES | UNLISTED | OTHERS).get(family, {}) | changes
    if "text_config" in kind.sub_configs:
        text = {n: v for n, v in SMALL.items() if n in _fields(kind.sub_configs["text_config"])}
        return kind(text_config=text | ALTERNATING, **fields)
    return kind(**({name: value for name, value in SMALL.items() if name in _fields(kind)} | fields))


def _fields(kind: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - set(kind.attribute_map)


def tiny_model(family: str, **changes: object) -> PreTrainedModel:
    """A random model whose layers all matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w63, split at spaces."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def tiny_ids(batch: int = 3, tokens: int = 17) -> torch.Tensor:
    """[B, T] random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def tiny_texts(lengths: Iterable[int] = (30,) * 40) -> list[str]:
    """Different texts of `tiny_tokenizer`'s words, of these numbers of words."""
    return [
        " ".join(f"w{3 + (7 * line + word * word) % 60}" for word in range(length))
        for line, length in enumerate(lengths)
    ]


def save_texts(path: Path, texts: Iterable[str] | None = None) -> Path:
    """Writes texts (`tiny_texts()` if none are given) to a .jsonl file, and returns its path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or tiny_texts()))
    return path


def save_tiny(folder: Path, family: str = "llama") -> Path:
    """A model folder as a user has it."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
