"""Writes a Qwen2 checkpoint with a byte-level BPE tokenizer as a GGUF file, without llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    rope_theta: float | None = None,
    head: np.ndarray | None = None,
    merges: list[str] | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Writes what a converter would, or what a wrong one would.

    Args:
        rope_theta: instead of the config's.
        head: written beside the tied embedding, [V, D].
        merges: of the tokenizer, instead of its own.
        fields: added to the header.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta or config["rope_parameters"]["rope_theta"])
    for name, value in (fields or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    _add_tokenizer(writer, tokenizer, merges)
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    if head is not None:
        writer.add_tensor("output.weight", head.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name that llama.cpp has for a tensor."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, parameter = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{parameter}"


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], merges: list[str] | None) -> None:
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {index: text for text, index in vocabulary} | special
    own = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in sorted(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[index] for index in sorted(tokens)])
    writer.add_token_types(kinds)
    writer.add_token_merges(own if merges is None else merges)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
