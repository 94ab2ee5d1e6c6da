"""Attention of one new token a row, with query heads that share a key head as rows of one small matrix.

Where fewer heads have keys than queries (GQA, arXiv 2305.13245), PyTorch's kernel for the CPU reads each key head as
many times as it has queries, in a layout that it makes anew at each call: most of the time of generating text. As rows
of a matrix they read it once; the numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def grouped_queries() -> Iterator[None]:
    """For the time of the context, models on the CPU whose attention is `sdpa` attend in this way where they can."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_sdpa  # over what is registered, which shows again without it
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa_attention_forward` gives.

    Args:
        query: [B, heads, T, width of a head]; one new token a row is T = 1.
        key, value: [B, heads with keys, tokens, width of a head].
        attention_mask: [B, 1, T, tokens], or None.

    Returns:
        [B, T, heads, width of a head], and no weights.
    """
    batch, heads, length, width = query.shape
    shared = attention_mask is None or attention_mask.shape[1] == 1
    others = {name for name, given in options.items() if given is not None} & {"softcap", "position_bias", "s_aux"}
    if length > 1 or key.shape[1] == heads or key.device.type != "cpu" or dropout or not shared or others:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    attended = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(batch, heads, 1, -1).transpose(1, 2), None
