"""How far a runtime may be from transformers in float32, by the precision of the weights that it runs.

A runtime that computes the same function differs by rounding alone. The limits stand several times above what rounding
was measured to do to students that were not healed, whose distributions are the most sensitive (docs/deploy.md has the
figures), and below what a wrong rotary base, window or head does (KL 0.2 and more).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that a precision explains.

    Attributes:
        kl: mean over the compared positions, in nats.
        same_top: the smallest share of positions with the same most likely token.
        why: in words.
    """

    kl: float
    same_top: float
    why: str


PRECISIONS = {
    "fp32": Limits(1e-4, 0.99, "sums in another order; KV caches in float16"),
    "16-bit": Limits(5e-3, 0.95, "weights and activations with 8 or 11 significant bits"),
    "8-bit": Limits(3e-2, 0.90, "weights with 8 bits and a scale a block; activations often too"),
    "4-bit": Limits(3e-1, 0.65, "weights with 4 or 5 bits and scales"),
}


def precision_of(name: str) -> str | None:
    """The precision that a runtime's word for a dtype or a quantisation means; None if it is not known.

    As in `torch.float32`, `bfloat16`, `MOSTLY_Q4_K_M`, `int8`, `IQ4_XS`.
    """
    text = name.lower().rsplit(".", 1)[-1]
    if text in PRECISIONS:
        return text
    if re.search(r"bf16|bfloat16|float16|fp16|f16|half|^16$", text):
        return "16-bit"
    if re.search(r"float32|fp32|f32|^32$", text):
        return "fp32"
    bits = re.search(r"(?:i?q|int|^u|^i|w)(\d+)", text) or re.fullmatch(r"()?(\d)(?:-?bit)?", text)
    if not bits:
        return None
    count = int(bits[bits.lastindex or 1])
    return "8-bit" if count in (6, 8) else "4-bit" if count in (4, 5) else None
