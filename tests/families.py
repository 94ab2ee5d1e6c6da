"""Tiny random models of each family, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

LAYERS, VOCABULARY = 6, 64
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

FAMILIES = {
    "llama": ("LlamaConfig", SHAPE),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", SHAPE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", SHAPE | ALTERNATING | {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", SHAPE | ALTERNATING | {"head_dim": 8}),
    "phi3": ("Phi3Config", SHAPE),
    "olmo2": ("Olmo2Config", SHAPE),
    "gpt2": ("GPT2Config", IDS | {"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}  # fmt: skip
# Families without a row of their own: found by their modules.
UNLISTED = {
    "smollm3": ("SmolLM3Config", SHAPE | {"no_rope_layer_interval": 2}),
    "cohere2": ("Cohere2Config", SHAPE | ALTERNATING | {"logit_scale": 0.25}),
    "starcoder2": ("Starcoder2Config", SHAPE),
}


def tiny_model(family: str, **changes: object) -> PreTrainedModel:
    """A random model whose layers all matter."""
    name, fields = (FAMILIES | UNLISTED)[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**(fields | changes))).eval()
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


def tiny_ids(batch: int = 3, tokens: int = 17) -> torch.Tensor:
    """[B, T] random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def save_tiny(folder: Path, family: str = "llama") -> Path:
    """A model folder as a user has it."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
