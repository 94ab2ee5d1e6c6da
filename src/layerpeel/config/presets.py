"""Values of `distill` that go together under a name; a config that names it may give any of them another value."""

from __future__ import annotations

from typing import Any

# Kovalev and Tikhomirov (arXiv 2511.05085) and their published script: what they train, on which losses, with which
# optimizer, and a step of the tokens that each of their GPUs had: four micro-batches of two rows of 2,048.
PAPER: dict[str, Any] = {
    "when": "each_round",
    "last_pass": None,
    "repair": False,
    "train": "neighbours",
    "radius": 1,
    "train_norm": False,
    "train_head": False,
    "losses": {
        "kl": {"weight": 1.0, "reduction": "sum/100", "temperature": 1.0},
        "hidden_mse": {"weight": 1.0, "relative": False, "layers": "last", "final": True},
    },
    "balance_losses": False,
    "tokens_per_step": 16_384,
    "optimizer": "AdamW",
    "optimizer_options": {},
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
    "warmup_steps": 8,
    "max_grad_norm": 0.3,
    "average_last": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {"paper": PAPER}
