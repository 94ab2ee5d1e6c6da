"""What `runs.py` runs, for the test to name without the device in its own process."""

from __future__ import annotations

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral", "qwen3_next"]
CASES = [(family, "float32") for family in FAMILIES]
CASES += [(family, "bfloat16") for family in ("llama", "gemma3_text", "qwen3_next")]
