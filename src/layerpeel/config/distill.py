"""The section `distill`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from layerpeel.config.fields import AS_BYTES, AS_COUNT, Section, Texts


def _as_switch(value: Any) -> Any:
    """Converts the booleans that YAML makes of on and off back; leaves other values to pydantic."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class LossConfig(BaseModel):
    """A loss's weight, and whatever options it has."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its factor in the sum."""


class LastPassConfig(Section):
    """A last training, after the last removal."""

    tokens: Annotated[int, Field(ge=1), AS_COUNT]
    """How many to train on."""
    train: str = "everything"
    """Which parameters, as in `distill.train`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its peak; that of the rounds if not given."""


class DistillConfig(Section):
    """How the student is distilled from the teacher after each removal."""

    text: Texts = []
    """What to train on; sources are mixed document by document."""
    tokens_per_round: Annotated[int, Field(ge=0), AS_COUNT] = 400_000
    """Tokens to train on in each round; 0 for no training."""
    when: Literal["each_round", "end"] = "each_round"
    """end: do not train between removals, but once after the last, on tokens_per_round for each layer that went."""
    sequence_length: Annotated[int, Field(ge=2), AS_COUNT] = 256
    """Tokens in a row."""
    batch_size: Annotated[int, Field(ge=1), AS_COUNT] = 16
    """Rows in a micro-batch."""
    accumulation: Annotated[int, Field(ge=1), AS_COUNT] = 1
    """Micro-batches in an optimizer step."""
    packing: bool = True
    """Several documents in a row, each whole where it fits and none seeing another; else one document a row,
    padded. One longer than a row is cut into several rows. Models that cannot keep documents of a row apart (recurrent
    ones) get one a row in any case."""
    fresh_text: bool = True
    """Each round goes on in the text where the last one stopped, and begins again at its end; else every round
    trains on the same text, and the teacher's hidden states can be kept (see teacher_cache)."""
    train: str = "all"
    """Which layers: neighbours (of every gap, within radius), above (the first gap), all; everything, embeddings and
    head included; or a regular expression that is searched in parameter names with the teacher's layer indices."""
    radius: Annotated[int, Field(ge=1)] = 1
    """How far from a gap a neighbour may be."""
    train_norm: bool = False
    """Train the final norm, too."""
    train_head: bool = False
    """Train the head, too. If it is tied to the embeddings they train with it, and no layer is shared any more."""
    last_pass: LastPassConfig | None = None
    """One more training after the last removal."""
    losses: dict[str, LossConfig] = {"kl": LossConfig(), "hidden_mse": LossConfig()}
    """The losses and their weights: names from the table of losses, or module:Class."""
    balance_losses: bool = False
    """Scale each loss to the running size of the first one, before its weight."""
    optimizer: str = "AdamW"
    """A class of torch.optim, as AdamW, Adafactor or SGD; or module:Class, derived from torch.optim.Optimizer. Muon
    takes only matrices: it gets those of the layers, and AdamW the rest."""
    optimizer_options: dict[str, Any] = {}
    """Its other keyword arguments, as {betas: [0.9, 0.95]} or {fused: true}."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Its peak; a cosine brings it to 0 within each round."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of optimizers that take one."""
    warmup_steps: Annotated[int, Field(ge=0), AS_COUNT] = 8
    """Optimizer steps to the peak; at most half of a round."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are clipped to this norm."""
    max_skipped_steps: Annotated[int, Field(ge=0), AS_COUNT] = 10
    """Steps whose loss or gradient is not finite are skipped; after more than so many, the round starts again with
    half the learning rate."""
    activation_checkpointing: bool = False
    """Keep only what enters each layer, and run it again in the backward pass: less memory, a third more time."""
    save_every: Annotated[float, Field(ge=0)] = 600.0
    """Seconds between saves of the state of training, from which a run that was killed goes on; saves that take long
    are made less often; 0: after each step. With AdamW it takes three times the room of what trains, in float32."""
    teacher_cache: Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)] = "auto"
    """Keep the teacher's hidden states on disk, in bfloat16, for text that comes again; auto: where every round trains
    on the same text and they fit into teacher_cache_size and half of the free disk."""
    teacher_cache_size: Annotated[int, Field(ge=0), AS_BYTES] = 20 * 2**30
    """Bytes that they may take, as 20GB."""

    @model_validator(mode="after")
    def _trainable(self) -> DistillConfig:
        if self.tokens_per_round and not self.losses:
            raise ValueError("losses: expected at least one")
        if self.tokens_per_round and not any(loss.weight for loss in self.losses.values()):
            raise ValueError("losses: expected at least one with a weight above 0")
        if self.when == "end" and self.last_pass:
            raise ValueError("last_pass: with when: end, the training at the end is that of the rounds; leave it out")
        try:
            re.compile(self.train)
        except re.error as error:
            raise ValueError(f"train: not a regular expression ({error})") from None
        return self

    def in_rounds(self) -> DistillConfig:
        """What is done in each round."""
        return self if self.when == "each_round" else self.model_copy(update={"tokens_per_round": 0})

    def at_end(self, removed: int) -> LastPassConfig | None:
        """What is done after so many removals, if anything."""
        tokens = self.tokens_per_round * removed
        return LastPassConfig(tokens=tokens, train=self.train) if self.when == "end" and tokens else self.last_pass

    def text_tokens(self, removed: int) -> int:
        """Tokens of text that the trainings of so many removals read, without reading any twice."""
        rounds = removed if self.fresh_text or self.when == "end" else 1
        return self.tokens_per_round * rounds + (self.last_pass.tokens if self.last_pass and self.fresh_text else 0)
