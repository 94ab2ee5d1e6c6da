"""The memory that a batch may take on all branches, and what to do when the device runs out all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerpeel.errors import RunError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.memory import memory_is_full

# Memory for a token while a layer runs, in hidden states: inputs, projections, the wide middle of the MLP.
LAYER_WIDTH = 24


def bytes_of_token(branches: int, width: int, itemsize: int) -> int:
    """Bytes for a token of a batch on all branches, while a layer runs."""
    return branches * LAYER_WIDTH * width * itemsize


def _free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, those included that torch keeps for reuse; 2 GiB on other devices."""
    if device.type != "cuda":
        return 2**31
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def explaining_full_memory(what: str, hint: str) -> Iterator[None]:
    """For the time of work that cannot be done in smaller parts.

    Args:
        what: is done, after "out of memory ".

    Raises:
        RunError: memory has run out.
    """
    try:
        yield
    except Exception as error:
        if not memory_is_full(error):
            raise
        raise RunError(f"out of memory {what}", hint=hint) from None


class Budget:
    """Bytes that a batch may take on all branches, and the sizes of the chunks in which it is computed.

    Running out of memory halves all of them. The chunk sizes are handed to each call: `LayerwiseModel` keeps none but
    its defaults.

    Attributes:
        bytes: what a batch may take now.
        halved: how often that was halved.
        tokens_per_call: tokens through a layer at a time; None, for the model's default, until memory has run out.
    """

    def __init__(self, size: int | None, device: torch.device) -> None:
        """If no size is given: 1 GiB on a CPU, and on a GPU about half of what is free.

        The latter is a power of two, so that an interrupted scoring makes the same batches when it resumes.
        """
        if size is None:
            size = 2 ** (_free_bytes(device).bit_length() - 2)
        self.bytes, self.halved = size, 0
        self.tokens_per_call: int | None = None
        self._logit_rows: int | None = None

    def tokens(self, layerwise: LayerwiseModel, branches: int) -> int:
        """How many tokens of a batch fit, each of them on all branches."""
        return max(1, self.bytes // bytes_of_token(branches, layerwise.width, layerwise.model.dtype.itemsize))

    def logit_rows(self, layerwise: LayerwiseModel, branches: int) -> int:
        """How many positions may go through the head at a time, each of them on all branches."""
        return max(1, (self._logit_rows or layerwise.logit_rows_at_a_time) // branches)

    def shrink(self, error: Exception, layerwise: LayerwiseModel, branches: int, row: int) -> None:
        """Halves the budget and the chunks after an error, if memory has run out and there is something to halve.

        Args:
            row: tokens of the longest row, which cannot be split.

        Raises:
            RunError: not even one row fits.
            Exception: `error` itself, if it is about something else.
        """
        if not memory_is_full(error):
            raise error
        tokens = self.tokens(layerwise, branches)
        at_a_time = min(self.tokens_per_call or layerwise.tokens_per_call, branches * max(row, tokens))
        if at_a_time <= row and tokens <= row:
            raise RunError(
                f"out of memory with a single row of {row} tokens in {branches} branches",
                hint="score fewer candidates (score.protect), shorter samples, or on a larger device",
            ) from None
        self.bytes //= 2
        self.halved += 1
        self.tokens_per_call = max(1, at_a_time // 2)
        self._logit_rows = max(1, (self._logit_rows or layerwise.logit_rows_at_a_time) // 2)
