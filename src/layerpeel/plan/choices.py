"""What a first config chooses, and the config as text: one comment a line, on what to change and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from layerpeel.config.distill import RepairConfig
from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.config.yaml_values import read_yaml

PLAIN = re.compile(r"[A-Za-z/._~][A-Za-z0-9/._~-]*")  # what needs no quotes in YAML, where it is no other value
COMMENTS_AT = 50  # the column of comments, after lines that are shorter
KEPT = 4  # candidates that the tasks decide among


@dataclass(frozen=True)
class Scoring:
    """How layers are scored: by which metric, on how many tokens, every so many rounds (0: once)."""

    decide: str
    tokens: int
    every: int = 1


@dataclass(frozen=True)
class Choices:
    """What a first config says.

    Attributes:
        teacher: a folder or a hub name.
        output: the run's folder.
        layers: the teacher's depth.
        target_layers: the depth to reach.
        text: where text is; None for the teacher's own.
        hold_out: of so many documents of the text one is left out, where there is text.
        tasks: their fields, but for `limit`.
        limit: rows of each task.
        repair_tokens: 0 for no repair.
        score_memory: bytes for branches; the default if None.
        stream: layers are read from the disk as they run.
        tokens_per_step: the default if None.
    """

    teacher: str
    output: str
    layers: int
    target_layers: int
    scoring: Scoring
    tokens_per_round: int
    sequence_length: int = 256
    text: str | None = None
    hold_out: int | None = None
    tasks: tuple[Mapping[str, Any], ...] = ()
    limit: int = 0
    batch_size: int = 8
    repair_tokens: int = RepairConfig().tokens
    score_memory: int | None = None
    checkpointing: bool = False
    train: str = "all"
    dtype: str = "auto"
    stream: bool = False
    tokens_per_step: int | None = None

    @property
    def rounds(self) -> int:
        return self.layers - self.target_layers

    def config(self) -> RunConfig:
        """The config that the text says; paths in it are as they were given."""
        return parse_config(read_yaml(self.text_of_config(), "init", "see configs/ for examples"), "init")

    def text_of_config(self, heading: str = "") -> str:
        """The config as YAML.

        Args:
            heading: what it says first, without the sign of a comment.
        """
        lines = [*([f"# {heading}"] if heading else []), "# Every field: docs/reference/config.md"]
        return "\n".join([*lines, *(_commented(line, comment) for line, comment in self._lines())]) + "\n"

    def _lines(self) -> list[tuple[str, str]]:
        """Lines of YAML, each with its comment."""
        return [
            (f"teacher: {_value(self.teacher)}", ""),
            (f"output: {_value(self.output)}", "of the run, which goes on there if it is started again"),
            (
                f"stop: {{target_layers: {self.target_layers}}}",
                "min_quality: 0.9 beside it ends at that share (with when: end compared before training)",
            ),
            *self._scoring_lines(),
            *self._task_lines(),
            *self._distill_lines(),
            *(
                [(f"dtype: {self.dtype}", "of frozen weights, as stored; float32 is exact, and slower here")]
                * self._narrow
            ),
        ]

    @property
    def _narrow(self) -> bool:
        return self.dtype != "auto"

    def _scoring_lines(self) -> list[tuple[str, str]]:
        scoring = self.scoring
        every = "removals from one ranking; 1 scores anew after each" if scoring.every else "all layers by one ranking"
        by_tasks = scoring.decide == "task_quality"
        decide = (
            "by what the tasks lose" if by_tasks else "KL to the teacher; task_quality asks the tasks, and takes longer"
        )
        return [
            ("score:", ""),
            *([("  weights: stream", "layers are read from disk as they run: the model does not fit")] * self.stream),
            (f"  decide: {scoring.decide}", decide),
            *([(f"  shortlist: {{by: teacher_kl, keep: {KEPT}}}", "layers that the tasks are asked about")] * by_tasks),
            (f"  tokens: {_number(scoring.tokens)}", "of the text; more tell close layers apart"),
            *([(f"  every: {scoring.every}", every)] * (scoring.every != 1)),
            *(
                [(f"  memory: {_megabytes(self.score_memory)}", "for candidates; more is faster")]
                * bool(self.score_memory)
            ),
        ]

    def _task_lines(self) -> list[tuple[str, str]]:
        lines = [("tasks:", "what quality is: put your own in their place (docs/tasks.md)")]
        for fields in self.tasks:
            pairs = ", ".join(f"{name}: {_value(value)}" for name, value in {**fields, "limit": self.limit}.items())
            lines.append((f"  - {{{pairs}}}", ""))
        return lines

    def _distill_lines(self) -> list[tuple[str, str]]:
        if self.text:
            held = "of so many documents the first is for held_out"
            held += "" if self.stream else "; {from: teacher} may stand beside it"
            text = (f"  text: {{path: {_value(self.text)}, hold_out: {self.hold_out}}}", held)
        else:
            text = ("  text: {from: teacher}", "or [corpus/, {from: teacher}] with text of your own, which helps")
        repair = f"  repair: {{tokens: {_number(self.repair_tokens)}}}" if self.repair_tokens else "  repair: false"
        return [
            ("distill:", ""),
            *(
                [("  weights: stream", "the same in score and distill; memory where it suffices is faster")]
                * self.stream
            ),
            text,
            (
                f"  tokens_per_round: {_number(self.tokens_per_round)}",
                "for each layer that goes: the first to raise, given time",
            ),
            ("  when: end", "all of them after the last removal; each_round, given more, heals every depth"),
            (f"  sequence_length: {self.sequence_length}", "more where long contexts matter"),
            (f"  batch_size: {self.batch_size}", "rows at a time; fewer take less memory"),
            *(
                [(f"  tokens_per_step: {self.tokens_per_step}", "for each of which all layers are read twice")]
                * bool(self.tokens_per_step)
            ),
            (repair, "in closed form, after each removal; more is better up to 131,072"),
            *([(f"  train: {self.train}", "of the layers, to fit into memory; all is better")] * (self.train != "all")),
            *([("  activation_checkpointing: true", "to fit into memory; false is faster")] * self.checkpointing),
        ]


def _commented(line: str, comment: str) -> str:
    return f"{line.ljust(COMMENTS_AT - 1)} # {comment}" if comment else line


def _value(value: Any) -> str:
    """A plain value in YAML, within a line."""
    if not isinstance(value, str):
        return str(value)
    is_plain = PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _number(value: int) -> str:
    return f"{value:_}" if value >= 10_000 else str(value)


def _megabytes(size: int | None) -> str:
    return f"{(size or 0) // 2**20}MB"
