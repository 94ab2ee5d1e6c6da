"""A causal language model run layer by layer, outside its own forward.

Each layer's arguments (masks, rotary embeddings, positions) are recorded from the model's own forward
(`LayerInputRecorder`), so that no family needs code of its own.

Batches are right-padded and no padding mask is passed: under causal attention a real token never sees what follows
it, so its hidden state is the same with and without padding.

Shapes: B batch, T tokens, D hidden, V vocabulary, L layers, C candidates, S branches (1 + C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from layerpeel.inference.kv_cache import KeyValueRecorder, LayerKeyValues
from layerpeel.inference.trials import runs_packed, runs_trees
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

# Bytes of fp32 logits that may exist at a time. A CPU is fastest if they fit its caches; but with fewer than
# LEAST_LOGIT_ROWS, reading the head's weights takes longer than computing with them.
LOGITS_BYTES_ON_CPU, LOGITS_BYTES, LEAST_LOGIT_ROWS = 8 * 2**20, 256 * 2**20, 512
# Tokens that go through a layer at a time: enough to keep a processor busy. On a CPU, few enough that their hidden
# states (HIDDEN_PER_CALL_ON_CPU numbers, tokens x D) fit its caches.
TOKENS_PER_CALL, LEAST_TOKENS_PER_CALL, HIDDEN_PER_CALL_ON_CPU = 8192, 256, 2**20


def tokens_per_call(width: int, device: str) -> int:
    """How many tokens may go through a layer at a time on a type of device."""
    return max(LEAST_TOKENS_PER_CALL, HIDDEN_PER_CALL_ON_CPU // width) if device == "cpu" else TOKENS_PER_CALL


def logit_rows_at_a_time(vocabulary: int, device: str) -> int:
    """How many rows of logits may exist at a time on a type of device."""
    size = LOGITS_BYTES_ON_CPU if device == "cpu" else LOGITS_BYTES
    return max(LEAST_LOGIT_ROWS, size // (4 * vocabulary))


class LayerwiseModel:
    """The decoder layers, the final norm and the head of a transformers model, to be called one by one.

    Making one runs the model's forward on a few tokens, with its layers replaced by stand-ins, to find out what it
    hands to a layer and expects back.

    Args:
        model: a causal language model; kept as `model`.
        weights_loaded: a context in which the layer at a position has its weights, for a model whose layers are not
            kept in memory (`model.streaming.StreamedLayers`).
        drop_read_ahead: frees the layer that was read before it was asked for, where no more will be.

    Attributes:
        layer_inputs: records what the model's own forward hands to its layers.
        streamed: whether `weights_loaded` was given.
        stand_ins: modules that run in the place of layers, by position, while these are split over processes.
        tokens_per_call: tokens through a layer at a time, where a call does not say otherwise.
        logit_rows_at_a_time: rows of logits at a time, where a call does not say otherwise.

    Raises:
        InputError: the model cannot be run layer by layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights_loaded: Callable[[int], AbstractContextManager[Any]] | None = None,
        drop_read_ahead: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.architecture = find_architecture(model)
        self.layer_inputs = LayerInputRecorder(self.architecture)
        self.streamed = weights_loaded is not None
        self.weights_loaded = weights_loaded or (lambda _: nullcontext())
        self.drop_read_ahead = drop_read_ahead or (lambda: None)
        self.stand_ins: Mapping[int, nn.Module] = {}
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
        """What the model's forward hands to its layers: the first one's hidden states, and each one's other arguments.

        Args:
            input_ids: [B, T], right-padded.
            positions: [B, T]; 0, 1, 2, ... in each row if not given.
            attention_mask: [B, T, T] of bool, which tokens each token attends to; causal if not given.

        Returns:
            hidden states [B, T, D], and one `(args, kwargs)` a layer.
        """
        inputs: dict[str, Tensor] = {"input_ids": input_ids.to(self.device)}
        if positions is not None:
            inputs["position_ids"] = positions.to(self.device)
        if attention_mask is not None:
            dtype = self.model.dtype
            masked = ~attention_mask.to(self.device)
            additive = torch.zeros(masked.shape, dtype=dtype, device=self.device)
            inputs["attention_mask"] = additive.masked_fill_(masked, torch.finfo(dtype).min)[:, None]
        return self.layer_inputs.record(inputs)

    def layer(self, position: int, hidden: Tensor, arguments: LayerInputs) -> Tensor:
        """Runs one layer on the batch that `arguments` were recorded for: [B, T, D] -> [B, T, D]."""
        return run_layer(self.stand_ins.get(position, self.layers[position]), hidden, arguments)

    def layer_on_branches(
        self, position: int, hidden: Tensor, arguments: LayerInputs, batch: int, tokens_per_call: int | None = None
    ) -> Tensor:
        """Runs one layer on all branches of the batch that `arguments` were recorded for, some rows at a time.

        Args:
            hidden: [S * B, T, D].
            batch: B.
            tokens_per_call: tokens at a time (at least one row).

        Returns:
            [S * B, T, D].
        """
        rows = max(1, (tokens_per_call or self.tokens_per_call) // hidden.shape[1])
        outputs = hidden[:0]
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            batch_rows = torch.arange(start, start + len(part), device=hidden.device) % batch
            output = self.layer(position, part, take_rows(arguments, batch_rows, batch, self.layer_inputs.rows, ()))
            if not start:  # allocated once: parts kept until a concatenation fragment a CPU's memory
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
        base_output = _BaseOutput(last_hidden_state=hidden[None])  # type: ignore[arg-type]
        base_calls = 0

        def base_forward(*_: Any, **__: Any) -> _BaseOutput:
            nonlocal base_calls
            base_calls += 1
            return base_output

        with replaced_forward(self.architecture.base, base_forward):
            logits = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        assert base_calls, "the model's forward did not call its base model"
        return logits

    def logit_rows(self, branches: int = 1) -> int:
        """How many positions may go through the head at a time, each of them on all branches."""
        return max(1, self.logit_rows_at_a_time // branches)

    @torch.no_grad()
    def forward_with_skips(
        self,
        input_ids: Tensor,
        candidates: Sequence[int] = (),
        hook: Callable[[int, Tensor, Tensor], None] | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_cache: list[LayerKeyValues | None] | None = None,
        tokens_per_call: int | None = None,
    ) -> Tensor:
        """Final hidden states of the model as it is and with each candidate skipped, in one pass over the layers.

        Before layer i the batch holds the untouched branch and one branch for each candidate already skipped; all
        go through layer i together, and skipping i adds a branch: a copy of layer i's input. For all L candidates
        that is L(L+1)/2 layer calls instead of L(L-1), with the numbers of removing and running.

        Args:
            input_ids: [B, T], right-padded.
            candidates: positions to skip, ascending.
            hook: called with (position, input, output) of each layer on the untouched branch, both [B, T, D].
            positions, attention_mask: as in `begin`.
            kv_cache: if given, each layer's keys and values on all branches are appended; None for a layer that
                stores something else.
            tokens_per_call: as in `layer_on_branches`.

        Returns:
            [S, B, T, D] after the final norm: the untouched branch first, then in the order of the candidates.
        """
        hidden, arguments = self.begin(input_ids, positions, attention_mask)
        batch = hidden.shape[0]
        for position, (args, kwargs) in enumerate(arguments):
            before = hidden[:batch]
            recorder = KeyValueRecorder()
            if kv_cache is not None:
                kwargs = kwargs | {name: recorder for name in kwargs if name in CACHE_ARGUMENTS}
            with self.weights_loaded(position):
                hidden = self.layer_on_branches(position, hidden, (args, kwargs), batch, tokens_per_call)
            if kv_cache is not None:
                kv_cache.append(recorder.recorded(hidden, batch))
            if hook:
                hook(position, before, hidden[:batch])
            if position in candidates:
                hidden = torch.cat([hidden, before])
        return self.norm(hidden).unflatten(0, (-1, batch))

    @cached_property
    def runs_trees(self) -> bool:
        """Whether prefix trees give what separate rows give; the first read tries it out."""
        return runs_trees(self)

    @cached_property
    def runs_packed(self) -> bool:
        """Whether documents in a row stay apart when positions restart at 0 in each; the first read tries it out."""
        return runs_packed(self)


def run_layer(layer: nn.Module, hidden: Tensor, arguments: LayerInputs) -> Tensor:
    """Runs a layer on the batch that `arguments` were recorded for: [B, T, D] -> [B, T, D]."""
    args, kwargs = arguments
    return first_tensor(layer(hidden, *args, **kwargs))


class _BaseOutput(BaseModelOutputWithPast):
    """The output of a base model: hidden states; whatever else a family's head reads (router logits, ...) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
