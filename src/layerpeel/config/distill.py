"""The section `distill`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from layerpeel.config.fields import AS_BYTES, AS_COUNT, AutoCount, Section, Texts
from layerpeel.config.presets import PRESETS

Packing = Literal["wrapped", "bfd", "none"]
"""How documents become rows, by TRL's names."""


def _as_switch(value: Any) -> Any:
    """Converts the booleans that YAML makes of on and off back; leaves other values to pydantic."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _packing_by_name(value: Any) -> Any:
    """Refuses the booleans that packing once was; leaves other values to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"expected wrapped, bfd or none; {str(value).lower()} is now {'bfd' if value else 'none'}")
    return value


class LossConfig(BaseModel):
    """A loss's weight, and whatever options it has."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its factor in the sum."""


class RepairConfig(Section):
    """Repair in closed form, after a removal and before training; no gradients.

    The output projections of attention and MLP, from the layer before the gap upward, are solved for what the teacher's
    hidden states need.
    """

    tokens: Annotated[int, Field(ge=1), AS_COUNT] = 131_072
    """Of the text of `distill`, to solve on."""
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """How much weights are held where they are, in units of the mean square of what enters them; auto: each
    projection's own, by what does best on an eighth of the tokens, held back."""


def _as_repair(value: Any) -> Any:
    """Makes the defaults of true; leaves other values to pydantic."""
    return {} if value is True else value


class LastPassConfig(Section):
    """The training after the last removal, where it differs from that of the rounds."""

    tokens: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """How many to train on, with `when: each_round`, padding not counted; with `end` and `half` they follow from
    tokens_per_round."""
    train: str | None = None
    """Which parameters, as in `distill.train`; those of the rounds if not given."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its peak; that of the rounds if not given."""
    warmup_steps: Annotated[int, Field(ge=0), AS_COUNT] | None = None
    """Optimizer steps to the peak; those of the rounds if not given."""


class DistillConfig(Section):
    """How the student is distilled from the teacher after each removal."""

    preset: Literal["paper"] | None = None
    """paper: every field below that is not given is as in the paper (arXiv 2511.05085), see the table of presets. Text,
    tokens and the shape of rows are not part of it; losses that are given take the place of all of the preset's."""
    text: Texts = []
    """What to train on; sources are mixed document by document."""
    tokens_per_round: Annotated[int, Field(ge=0), AS_COUNT] = 400_000
    """Real tokens, without padding, to train on in each round; 0 for no training."""
    when: Literal["each_round", "end", "half"] = "each_round"
    """each_round: train after each removal. end: train once after the last, on tokens_per_round for each layer that
    went. half: on half of tokens_per_round after each removal, and once after the last on the other half for each layer
    that went."""
    sequence_length: Annotated[int, Field(ge=2), AS_COUNT] = 256
    """Tokens in a row."""
    tokens_per_step: AutoCount = "auto"
    """Real tokens in an optimizer step, over all processes, never less than sequence_length; auto: a 400th of what is
    trained on, as a power of two from 512 to 524,288."""
    batch_size: Annotated[int, Field(ge=1), AS_COUNT] = 16
    """Rows in a micro-batch, at the most: it bounds memory, and has no other effect on a step."""
    packing: Annotated[Packing, BeforeValidator(_packing_by_name)] = "bfd"
    """How documents become rows. wrapped: joined, each after the end-of-text token of the one before, and cut, as in
    pretraining: no padding, and no mask but the causal one. bfd: several in a row, each whole where it fits and none
    seeing another; models that cannot keep them apart (recurrent ones) get one a row. none: one a row, padded. With
    bfd and none, a document longer than a row is cut into several rows."""
    fresh_text: bool = True
    """Each round goes on in the text where the last one stopped, and begins again at its end; else every round
    trains on the same text, and the teacher's hidden states can be kept (see teacher_cache)."""
    train: str = "all"
    """Which layers: neighbours (of every gap, within radius), above (the first gap), all; everything, embeddings and
    head included; or a regular expression that is searched in parameter names with the teacher's layer indices."""
    radius: Annotated[int, Field(ge=1)] = 1
    """How far from a gap a neighbour may be."""
    weights: Literal["memory", "stream"] = "memory"
    """stream: frozen layers are read from the checkpoint one at a time, forward and backward, and only what trains
    stays in memory, for a teacher larger than memory. In a run, score.weights has to be the same, and the student, too,
    is read so when it is evaluated."""
    train_norm: bool = False
    """Train the final norm, too."""
    train_head: bool = False
    """Train the head, too. If it is tied to the embeddings they train with it, and no layer is shared any more."""
    repair: Annotated[RepairConfig | Literal[False], BeforeValidator(_as_repair)] = RepairConfig()
    """Repair in closed form before training, where there is text; false: none."""
    last_pass: LastPassConfig | None = None
    """A training after the last removal: one more, on `tokens`, or how that of `when: end` and `half` differs from the
    rounds."""
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
    """Its peak."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How it goes on from its peak, within each round: down to 0 as a cosine or in a line, or not down at all."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of optimizers that take one."""
    warmup_steps: Annotated[int, Field(ge=0), AS_COUNT] = 8
    """Optimizer steps to the peak; at most half of a round."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are clipped to this norm."""
    average_last: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The student gets the mean of the weights after each step of this share of a training, its last: 0.25 for the last
    quarter; 0: the weights after the last step. See lr_scheduler_type for a learning rate that does not fall to 0."""
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Refuses old fields, and adds the preset's values of those not given; what is no preset is pydantic's."""
        if not isinstance(given, dict):
            return given
        if "accumulation" in given:
            raise ValueError(
                "accumulation: set tokens_per_step instead, the real tokens of an optimizer step over all processes; "
                "micro-batches of batch_size rows follow from it"
            )
        name = given.get("preset")
        return PRESETS[name] | given if isinstance(name, str) and name in PRESETS else given

    @property
    def repairs(self) -> RepairConfig | None:
        """How students are repaired, if they are."""
        return self.repair if self.repair and self.text else None

    @model_validator(mode="after")
    def _trainable(self) -> DistillConfig:
        if self.trains and not self.losses:
            raise ValueError("losses: expected at least one")
        if self.trains and not any(loss.weight for loss in self.losses.values()):
            raise ValueError("losses: expected at least one with a weight above 0")
        self._check_last_pass()
        _check_pattern("train", self.train)
        return self

    def _check_last_pass(self) -> None:
        """The tokens of the training at the end are said in one place."""
        if not self.last_pass:
            return
        if self.when == "each_round" and self.last_pass.tokens is None:
            raise ValueError("last_pass.tokens: expected how many to train on (or when: end, or half)")
        if self.when != "each_round" and self.last_pass.tokens is not None:
            raise ValueError(
                f"last_pass.tokens: with when: {self.when}, they are those of tokens_per_round; leave it out"
            )
        if self.last_pass.train is not None:
            _check_pattern("last_pass.train", self.last_pass.train)

    @property
    def trains(self) -> bool:
        """Whether anything is trained, in rounds or at the end."""
        return bool(self.tokens_per_round or self.at_end(1))

    def in_rounds(self) -> DistillConfig:
        """How the student is trained after each removal, on how many tokens."""
        tokens = {"each_round": self.tokens_per_round, "half": self.tokens_per_round // 2, "end": 0}[self.when]
        return self.model_copy(update={"tokens_per_round": tokens})

    def at_end(self, removed: int) -> DistillConfig | None:
        """How the student is trained after the last of so many removals, on how many tokens; None if it is not."""
        changes = self.last_pass.model_dump(exclude_none=True) if self.last_pass else {}
        left = (self.tokens_per_round - self.in_rounds().tokens_per_round) * removed
        tokens = changes.pop("tokens", left)
        return self.model_copy(update=changes | {"tokens_per_round": tokens}) if tokens else None

    def text_tokens(self, removed: int) -> int:
        """Tokens of text that the trainings of so many removals read, without reading any twice; or repair, if more."""
        in_rounds, at_end = self.in_rounds().tokens_per_round, self.at_end(removed)
        last = at_end.tokens_per_round if at_end else 0
        trained = in_rounds * removed + last if self.fresh_text else max(in_rounds, last)
        return max(trained, self.repairs.tokens if self.repairs else 0)


def _check_pattern(field: str, train: str) -> None:
    try:
        re.compile(train)
    except re.error as error:
        raise ValueError(f"{field}: not a regular expression ({error})") from None
