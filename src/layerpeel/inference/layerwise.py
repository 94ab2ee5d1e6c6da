"""A causal language model run layer by layer, outside its own forward.

Each layer's arguments (masks, rotary embeddings, positions) are taken from the model itself (`calls`), so that no
family needs code of its own.

Batches are right-padded and no padding mask is passed: under causal attention a real token never sees what follows
it, so its hidden state is the same with and without padding.

Shapes: B batch, T tokens, D hidden, V vocabulary, L layers, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from layerpeel.inference.kv_cache import LayerKeyValues, _KeyRecorder
from layerpeel.model.architecture import find_architecture
from layerpeel.model.config_fields import text_config
from layerpeel.model.layer_inputs import (
    CACHE_ARGUMENTS,
    LayerInputRecorder,
    LayerInputs,
    first_tensor,
    replaced_forward,
    take_rows,
)

# Bytes of fp32 logits that may exist at a time, to which chunks of positions are sized. A CPU is fastest within its
# caches; but below some rows the head's weights are read more often than they are used.
LOGITS_BYTES_ON_CPU, LOGITS_BYTES, LEAST_LOGIT_ROWS = 8 * 2**20, 256 * 2**20, 512
# Tokens that go through a layer at a time: enough to keep a processor busy, few enough for the caches of a CPU, where
# they are told by the numbers in their hidden states.
TOKENS_PER_CALL, LEAST_TOKENS_PER_CALL, HIDDEN_PER_CALL_ON_CPU = 8192, 256, 2**20


def tokens_per_call(width: int, device: str) -> int:
    """How many tokens may go through a layer at a time on a type of device."""
    return max(LEAST_TOKENS_PER_CALL, HIDDEN_PER_CALL_ON_CPU // width) if device == "cpu" else TOKENS_PER_CALL


def logit_rows_at_a_time(vocabulary: int, device: str) -> int:
    """How many rows of logits may exist at a time on a type of device."""
    size = LOGITS_BYTES_ON_CPU if device == "cpu" else LOGITS_BYTES
    return max(LEAST_LOGIT_ROWS, size // (4 * vocabulary))


class LayerwiseModel:
    """The decoder layers, the final norm and the head of `model`, to be called one by one.

    Args:
        resident: a context in which the layer at a position has its weights, for a model whose layers are not kept in
            memory (`streaming.StreamedLayers`).
    """

    def __init__(
        self, model: PreTrainedModel, weights_loaded: Callable[[int], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.model = model
        self.architecture = find_architecture(model)
        self.calls = LayerInputRecorder(self.architecture)
        self.streamed = weights_loaded is not None
        self.weights_loaded = weights_loaded or (lambda _: nullcontext())
        self.tokens_per_call = tokens_per_call(self.width, self.device.type)
        self.logit_rows_at_a_time = logit_rows_at_a_time(self.vocab_size, self.device.type)

    @property
    def layers(self) -> nn.ModuleList:
        return self.architecture.layers

    @property
    def norm_module(self) -> nn.Module:
        return self.architecture.norm

    @property
    def head_module(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def width(self) -> int:
        """D."""
        return text_config(self.model.config).hidden_size

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def begin(
        self, input_ids: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[LayerInputs]]:
        """What enters the first layer, and the other arguments of each layer.

        Args:
            input_ids: [B, T], right-padded.
            positions: [B, T], where a row is not simply 0, 1, 2, ...
            sees: [B, T, T] of bool, which tokens each token attends to, where that is not all before it.

        Returns:
            hidden states [B, T, D], and one `(args, kwargs)` a layer.
        """
        inputs: dict[str, Tensor] = {"input_ids": input_ids.to(self.device)}
        if positions is not None:
            inputs["position_ids"] = positions.to(self.device)
        if attention_mask is not None:
            dtype = self.model.dtype
            blocked = torch.zeros(attention_mask.shape, dtype=dtype).masked_fill_(
                ~attention_mask, torch.finfo(dtype).min
            )
            inputs["attention_mask"] = blocked[:, None].to(self.device)
        return self.calls.record(inputs)

    def layer(self, position: int, hidden: Tensor, arguments: LayerInputs) -> Tensor:
        """Runs one layer on the batch that `arguments` were recorded for: [B, T, D] -> [B, T, D]."""
        args, kwargs = arguments
        return first_tensor(self.layers[position](hidden, *args, **kwargs))

    def layer_on_streams(self, position: int, hidden: Tensor, arguments: LayerInputs, batch: int) -> Tensor:
        """Runs one layer on stacked copies of the batch that `arguments` were recorded for, some rows at a time.

        Args:
            hidden: [S * B, T, D].
            batch: B.

        Returns:
            [S * B, T, D].
        """
        rows = max(1, self.tokens_per_call // hidden.shape[1])
        outputs = hidden[:0]
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            of = torch.arange(start, start + len(part), device=hidden.device) % batch
            output = self.layer(position, part, take_rows(arguments, of, batch, self.calls.rows, ()))
            if not start:  # room for all at once: parts kept between what layers free leave holes in a CPU's memory
                outputs = output.new_empty(len(hidden), *output.shape[1:])
            outputs[start : start + rows] = output
        return outputs

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm: [..., D] -> [..., D]."""
        return self.architecture.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, with the scaling and soft-capping of the model's own forward.

        Args:
            hidden: [N, D], after the final norm.

        Returns:
            [N, V].
        """
        finished = _Finished(last_hidden_state=hidden[None])  # type: ignore[arg-type]
        asked = []

        def give_back(*_: Any, **__: Any) -> _Finished:
            asked.append(True)
            return finished

        with replaced_forward(self.architecture.base, give_back):
            logits = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        assert asked, "the head did not ask the base model for hidden states"
        return logits

    def logit_rows(self, streams: int = 1) -> int:
        """How many positions of `streams` streams may go through the head at a time."""
        return max(1, self.logit_rows_at_a_time // streams)

    @torch.no_grad()
    def forward_with_skips(
        self,
        input_ids: Tensor,
        candidates: Sequence[int] = (),
        hook: Callable[[int, Tensor, Tensor], None] | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keys: list[LayerKeyValues | None] | None = None,
    ) -> Tensor:
        """Walks the layers once, for the model as it is and for each candidate skipped.

        Before layer i the batch holds the untouched stream and one stream for each candidate already skipped; all
        go through layer i together, and skipping i adds a copy of what entered it. L(L+1)/2 layer calls instead of
        L(L-1) for all L candidates, and the numbers are those of removing and running.

        Args:
            input_ids: [B, T], right-padded.
            candidates: positions to skip, ascending.
            watch: called with (position, input, output) of the untouched stream, each [B, T, D].
            positions, sees: as in `begin`.
            keys: takes what each layer's attention computed; None for a layer that stores something else.

        Returns:
            [1 + C, B, T, D] after the final norm: untouched first, then in the order of the candidates.
        """
        hidden, arguments = self.begin(input_ids, positions, attention_mask)
        batch = hidden.shape[0]
        for position in range(len(self.layers)):
            before = hidden[:batch]
            args, kwargs = arguments[position]
            recorder = _KeyRecorder()
            if keys is not None:
                kwargs = kwargs | {name: recorder for name in kwargs if name in CACHE_ARGUMENTS}
            with self.weights_loaded(position):
                hidden = self.layer_on_streams(position, hidden, (args, kwargs), batch)
            if keys is not None:
                keys.append(recorder.all_of(hidden, batch))
            if hook:
                hook(position, before, hidden[:batch])
            if position in candidates:
                hidden = torch.cat([hidden, before])
        return self.norm(hidden).unflatten(0, (-1, batch))

    @cached_property
    def runs_trees(self) -> bool:
        """Whether rows may branch: tried on two sequences that share their first tokens."""
        ids = torch.arange(4) % self.vocab_size
        attention_mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]).bool()
        rows = self._tried(torch.stack([ids[[0, 1, 2]], ids[[0, 1, 3]]]))
        tree = self._tried(ids[None, :4], torch.tensor([[0, 1, 2, 2]]), attention_mask)
        return rows is not None and tree is not None and self._same(tree[0, 2:], rows[:, 2])

    @cached_property
    def runs_packed(self) -> bool:
        """Whether documents in a row stay apart when positions begin at 0 in each: tried on two of two tokens."""
        ids = torch.arange(4) % self.vocab_size
        rows = torch.stack([ids, ids[[0, 1, 1, 1]], ids[[2, 3, 3, 3]]])  # both, and each alone
        found = self._tried(rows, torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]))
        return found is not None and self._same(found[0], found[1:, :2].flatten(0, 1))

    def _tried(
        self, input_ids: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor | None:
        """[B, T, D] in fp32, or None if the model takes no such positions or mask."""
        try:
            return self.forward_with_skips(input_ids, positions=positions, attention_mask=attention_mask)[0].float()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return None

    def _same(self, hidden: Tensor, expected: Tensor) -> bool:
        tolerance = 1e-4 if self.model.dtype is torch.float32 else 0.02
        return bool((hidden - expected).norm() <= tolerance * expected.norm())


class _Finished(BaseModelOutputWithPast):
    """What a base model gives back; what else a family's head may ask for (router logits, states) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
