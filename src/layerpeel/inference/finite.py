"""Numbers that are not finite, named where they first appear: never averaged into a score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpeel.errors import RunError
from layerpeel.inference.layerwise import LayerwiseModel


class NotFiniteError(RunError):
    """A model gives NaN or infinity.

    Attributes:
        request: the index of the request, among those of the call; None if it is not known.
        tokens: of the text after which a model that writes it gives them.
    """

    def __init__(self, what: str, *, request: int | None = None, tokens: Sequence[int] = ()) -> None:
        super().__init__(
            what,
            hint="look for NaN or infinity in the weights, or for overflow (dtype: float32); if only the model without "
            "one layer does it, protect that layer (score.protect.layers)",
        )
        self.request, self.tokens = request, tokens


def refuse_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that lets logits pass, [B, V], unless one is NaN or plus infinity, which would be chosen.

    Raises:
        NotFiniteError: one is; its `request` is the row of the batch, its `tokens` those of the row.
    """
    bad = (torch.isnan(scores) | torch.isposinf(scores)).any(-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        what = "logits are NaN or infinite while the model generates text"
        raise NotFiniteError(what, request=row, tokens=input_ids[row].tolist())
    return scores


@torch.no_grad()
def first_not_finite(layerwise: LayerwiseModel, input_ids: Sequence[int]) -> str:
    """Where the model, as it is, first gives NaN or infinity for a text.

    Args:
        input_ids: at least one token.
    """
    places: list[str] = []

    def hook(position: int, before: Tensor, after: Tensor) -> None:
        for name, hidden in ((f"what enters layer {position}", before), (f"the output of layer {position}", after)):
            if not places and not torch.isfinite(hidden).all():
                places.append(name)

    layerwise.forward_with_skips(torch.tensor([list(input_ids)]), hook=hook)
    return f"{places[0] if places else 'the logits'}, in {str(layerwise.model.dtype).removeprefix('torch.')}"
