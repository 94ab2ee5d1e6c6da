"""Generation: greedy text against a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from rapidfuzz.distance import LCSseq
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import AS_COUNT
from layerpeel.data.cells import TableRow
from layerpeel.inference.requests import Generation
from layerpeel.tasks.base import FewShot, Sample
from layerpeel.tasks.scores import TaskScore
from layerpeel.tasks.templates import fill


class Generate(FewShot):
    """The mean over rows of the generated text's score against the target; both are stripped of outer whitespace."""

    prompt: str = "{prompt}"
    """A template over the row's columns."""
    target: str = "{target}"
    """A template over the row's columns."""
    metric: Literal["exact", "copy", "rouge1", "rouge2", "rougeL"] = "exact"
    """exact: the same text. copy: longest common subsequence of words, over the longer text's words. rouge*: F1 over
    words of any script."""
    max_new_tokens: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """The longest target's tokens and eight more, if not given."""
    stop: list[Annotated[str, Field(min_length=1)]] = ["\n"]
    """Text ends before the first of these."""

    def check(self) -> None:
        text_score(self.metric, "", "")  # a failing import shows before any long work
        self._prefix()
        for row in self.rows:
            self._fill(row)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        prefix = self._prefix()
        pairs = [self._fill(row) for row in self.rows]
        limit = self.max_new_tokens or 8 + max(
            len(tokenizer.encode(target, add_special_tokens=False)) for _, target in pairs
        )
        return [
            Sample([Generation(tuple(tokenizer.encode(prefix + prompt)), limit, tuple(self.stop))], target.strip())
            for prompt, target in pairs
        ]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        return TaskScore.of_mean(
            [
                text_score(self.metric, text.strip(), sample.reference)
                for sample, (text,) in zip(samples, answers, strict=True)
            ]
        )

    def _prefix(self) -> str:
        return self.fewshot_prefix(lambda row: "".join(self._fill(row)))

    def _fill(self, row: TableRow) -> tuple[str, str]:
        return fill(self.prompt, row, self.where), fill(self.target, row, self.where)


class _Words:
    """A tokenizer for rouge_score that keeps words of any script; its default keeps only a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def text_score(metric: str, text: str, target: str) -> float:
    """The score of a text against its target by a metric of `Generate`, from 0 to 1."""
    if metric == "exact":
        return float(text == target)
    if metric == "copy":
        return LCSseq.normalized_similarity(text.split(), target.split())
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, scikit-learn and pandas: 180 MiB

    return RougeScorer([metric], tokenizer=_Words()).score(target, text)[metric].fmeasure
