"""Memory for the streams of a batch: how much of it there is, and what to do when it runs out all the same."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size

from layerpeel.errors import RunError
from layerpeel.inference.layerwise import LayerwiseModel

# A token's share of a layer's memory while it runs, in hidden states: inputs, projections, the wide middle of the MLP.
LAYER_WIDTH = 24


def bytes_of_token(streams: int, width: int, itemsize: int) -> int:
    """What a token of a batch takes in all streams, while a layer runs on them."""
    return streams * LAYER_WIDTH * width * itemsize


class Budget:
    """Bytes that the streams of a batch may take; halved when memory runs out all the same.

    Attributes:
        bytes: what is left of it.
        halved: how often it was halved.
    """

    def __init__(self, size: int | None, device: torch.device) -> None:
        """Takes 1 GiB on a CPU and about half of what is free on a GPU, where no size is given.

        That is a power of two, so that batches are the same when an interrupted scoring goes on.
        """
        if size is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**31
            size = 2 ** (free.bit_length() - 2)
        self.bytes, self.halved = size, 0

    def tokens(self, layerwise: LayerwiseModel, streams: int) -> int:
        """Tokens of the batch that fit, with all streams of them."""
        return max(1, self.bytes // bytes_of_token(streams, layerwise.width, layerwise.model.dtype.itemsize))

    def shrink(self, error: Exception, layerwise: LayerwiseModel, streams: int, row: int) -> None:
        """After an error: halves the budget, if memory has run out and there is something left to halve.

        Args:
            row: tokens of the longest row, which cannot be split.

        Raises:
            RunError: not even one row fits.
            Exception: the error, if it is another.
        """
        if not should_reduce_batch_size(error):
            raise error
        at_a_time = min(layerwise.tokens_per_call, streams * max(row, self.tokens(layerwise, streams)))
        if at_a_time <= row and self.tokens(layerwise, streams) <= row:
            raise RunError(
                f"out of memory with a single row of {row} tokens in {streams} streams",
                hint="score fewer candidates (score.protect), shorter samples, or on a larger device",
            ) from None
        self.bytes //= 2
        self.halved += 1
        layerwise.tokens_per_call = max(1, at_a_time // 2)
        layerwise.logit_rows_at_a_time = max(1, layerwise.logit_rows_at_a_time // 2)
