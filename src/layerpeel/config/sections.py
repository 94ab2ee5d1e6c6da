"""`RunConfig` and its sections: a docstring for each field, and what must hold between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TextConfig(Section):
    """Where text comes from."""

    path: Annotated[str, Field(min_length=1)]
    """A .txt, .jsonl, .json, .csv, .parquet or .arrow file (or a .gz of one), a folder of such, a saved dataset, a
    glob, or a hub name; a hub dataset is read over the network as far as it is needed."""
    column: str = "text"
    """The column that holds the text, where there are columns."""
    messages: str | None = None
    """The column that holds chats, lists of {"role", "content"}, to be written by the tokenizer's chat template. A
    column `messages` is found by itself where there is no column `text`."""
    split: str = "train"
    """The split, where there are splits."""
    name: str | None = None
    """The subset of a hub dataset."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often the next document is from this source, against the weights of the others. A source that ends is drawn
    from no more: the others go on, by their weights, until all have ended. Then the text begins again."""
    shuffle: Annotated[int, Field(ge=0)] = 2048
    """Documents that are held in memory, of which the next is drawn at random, so that a sorted file gives no one-sided
    beginning; 0: in order. Lower it where documents are books."""


def _as_list(value: Any) -> Any:
    """One source or several, each a mapping or just a path."""
    values = [value] if isinstance(value, (str, dict)) else value
    return [{"path": item} if isinstance(item, str) else item for item in values] if isinstance(values, list) else value


Texts = Annotated[list[TextConfig], BeforeValidator(_as_list)]


NUMBER = r"[0-9]{1,18}(?:\.[0-9]{0,18})?"


def _parse_count(value: Any) -> Any:
    """Reads 2.5B, 300M, 40k as numbers."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*([kKmMbB])\s*", value) if isinstance(value, str) else None
    return int(float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]) if match else value


def _parse_bytes(value: Any) -> Any:
    """Reads 8GB, 500 MB as numbers of bytes."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*([KMGT]?)i?B\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    return int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " "))) if match else value


class StopConfig(Section):
    """When a run is over; the first that holds ends it."""

    target_layers: Annotated[int, Field(ge=1)] | None = None
    """The depth to reach."""
    min_quality: Annotated[float, Field(gt=0, le=1)] | None = None
    """A floor: the share of the teacher's aggregate to keep. The last student above it is the result."""
    max_params: Annotated[int, BeforeValidator(_parse_count), Field(ge=1)] | None = None
    """The size to reach, in parameters; 2.5B and 300M are understood."""

    @model_validator(mode="after")
    def _some_stop(self) -> StopConfig:
        if self.target_layers is None and self.min_quality is None and self.max_params is None:
            raise ValueError("expected at least one of target_layers, min_quality, max_params")
        return self


class ShortlistConfig(Section):
    """A cheap metric that chooses which layers the deciding one looks at."""

    by: str = "teacher_kl"
    """A metric."""
    keep: Annotated[int, Field(ge=1)]
    """How many candidates stay."""


class ProtectConfig(Section):
    """Layers that never go, by the teacher's index."""

    first: Annotated[int, Field(ge=0)] = 1
    """This many of the first."""
    last: Annotated[int, Field(ge=0)] = 1
    """This many of the last."""
    layers: list[int] = []
    """And these."""


class RaceConfig(Section):
    """Task scores in growing shares of the samples; candidates that are surely worse get no more of them."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    """How sure, for one candidate in one comparison with the best (one-sided, paired on the same samples)."""
    first_share: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """The share of each task's samples after which candidates first drop out; half as many tokens more each time."""


class HealConfig(Section):
    """A short distillation of the last few candidates before the choice."""

    keep: Annotated[int, Field(ge=2)] = 2
    """How many."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps for each, as `distill` says, but for their number."""


class ScoreConfig(Section):
    """How layers are scored."""

    decide: str = "task_quality"
    """The metric whose lowest layer goes: task_quality, teacher_kl, block_influence, or module:Class."""
    shortlist: ShortlistConfig | None = None
    """Score all candidates by a cheap metric first, and only the best by `decide`."""
    protect: ProtectConfig = ProtectConfig()
    """Layers that never go."""
    every: Annotated[int, Field(ge=0)] = 1
    """Score again every so many rounds; the rounds between remove the next of the last ranking. 0: rank once. A ranking
    that is used up, as that of a shortlist may be, is made anew."""
    text: Texts | None = None
    """Text for the metrics that read it; that of `distill` if not given."""
    tokens: Annotated[int, Field(ge=1)] = 16_384
    """How many tokens of it."""
    race: RaceConfig | None = None
    """Stop early on candidates that are surely worse; for metrics that run tasks."""
    heal: HealConfig | None = None
    """In a run: before the choice, distil the gap of the best few for a moment, and choose by what tasks say then."""
    memory: Annotated[int, BeforeValidator(_parse_bytes), Field(ge=2**20)] | None = None
    """Bytes for the streams of all candidates, as 8GB; 1GB on a CPU, half of what is free on a GPU, if not given."""
    weights: Literal["memory", "stream"] = "memory"
    """stream: layers are read from the checkpoint one at a time while the model is scored (`score` only), so that a
    model larger than memory can be."""


class TaskConfig(BaseModel):
    """A measurement of quality; its kind decides what other keys there are."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: str
    """choice, pairs, generate, perplexity, harness, or module:Class."""
    name: str = ""
    """What it is called in tables; the kind if not given."""

    @model_validator(mode="after")
    def _name(self) -> TaskConfig:
        self.name = self.name or self.kind
        return self


class LossConfig(BaseModel):
    """A loss's weight, and whatever options it has."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its factor in the sum."""


class LastPassConfig(Section):
    """A last training, after the last removal."""

    tokens: Annotated[int, BeforeValidator(_parse_count), Field(ge=1)]
    """How many."""
    train: str = "everything"
    """Which parameters, as in `distill.train`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its peak; that of the rounds if not given."""


class DistillConfig(Section):
    """How the gap is healed after each removal."""

    text: Texts = []
    """What to train on; sources are mixed document by document."""
    tokens_per_round: Annotated[int, Field(ge=0)] = 400_000
    """Tokens to train on in each round; 0 for no training."""
    when: Literal["each_round", "end"] = "each_round"
    """end: do not train between removals, but once after the last, on tokens_per_round for each layer that went."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in a row."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows in a micro-batch."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches in an optimizer step."""
    packing: bool = True
    """Several documents in a row, each whole where it fits and none seeing another; else one document a row, cut or
    padded. Models that cannot keep documents of a row apart (recurrent ones) get one a row in any case."""
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
    """The losses and their weights: kl, reverse_kl, jensen_shannon, cross_entropy, hidden_mse, hidden_cosine, or
    module:Class."""
    balance_losses: bool = False
    """Scale each loss to the running size of the first one, before its weight."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW; a cosine brings it to 0 within each round."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 8
    """Optimizer steps to the peak; at most half of a round."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are clipped to this norm."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps whose loss or gradient is not finite are skipped; after more than so many, the round starts again with
    half the learning rate."""
    activation_checkpointing: bool = False
    """Keep only what enters each layer, and run it again in the backward pass: less memory, a third more time."""
    save_every: Annotated[float, Field(ge=0)] = 600.0
    """Seconds between saves of the state of training, from which a run that was killed goes on; saves that take long
    are made less often; 0: after each step. It takes three times the room of what trains, in float32."""
    teacher_cache: Literal["auto", "on", "off"] = "auto"
    """Keep the teacher's hidden states on disk, in bfloat16, for text that comes again; auto: where every round trains
    on the same text and they fit into teacher_cache_size and half of the free disk."""
    teacher_cache_size: Annotated[int, BeforeValidator(_parse_bytes), Field(ge=0)] = 20 * 2**30
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


class RunConfig(Section):
    """A whole run."""

    teacher: Annotated[str, Field(min_length=1)]
    """A model folder or a hub name."""
    output: Path
    """The run's folder; running again goes on with it."""
    stop: StopConfig
    """When it is over."""
    score: ScoreConfig = ScoreConfig()
    """How layers are scored."""
    tasks: list[TaskConfig] = []
    """What quality is: measured on the teacher, and on the student after each round."""
    aggregate: Literal["mean", "relative"] = "mean"
    """Of the tasks' scores: their mean, or the mean of score / teacher's score."""
    distill: DistillConfig = DistillConfig(tokens_per_round=0)
    """How the gap is healed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the order of the training text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where to send training curves as they grow, through accelerate; tensorboard writes below `output`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; auto: float32 on a CPU, else that of the checkpoint."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""
    memory_limit: Annotated[int, BeforeValidator(_parse_bytes), Field(ge=1)] | None = None
    """A config that surely needs more bytes than this is refused; what the machine has in all, if not given."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.distill.tokens_per_round and not self.distill.text:
            raise ValueError("distill.text: expected text to train on (or distill.tokens_per_round: 0)")
        if self.score.heal and not self.distill.text:
            raise ValueError("distill.text: expected text to heal candidates on (or no score.heal)")
        if not self.tasks:
            raise ValueError("tasks: expected at least one, to say what quality is")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: expected different names, found '{twice[0]}' twice")
        return self
