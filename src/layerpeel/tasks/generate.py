"""Generation: greedy text against a target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from rapidfuzz.distance import LCSseq
from transformers import PreTrainedTokenizerBase

from layerpeel.inference.requests import Generation, Request
from layerpeel.tasks.base import FewShot, Row
from layerpeel.tasks.scores import TaskScore
from layerpeel.tasks.templates import fill


class Generate(FewShot):
    """The mean over rows of how well the generated text meets the target; both stripped of outer space."""

    prompt: str = "{prompt}"
    """A template over the row's columns."""
    target: str = "{target}"
    """A template over the row's columns."""
    metric: Literal["exact", "copy", "rouge1", "rouge2", "rougeL"] = "exact"
    """exact: the same text. copy: longest common subsequence of words, over the longer text's words. rouge*: F1 over
    words of any script."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """The longest target's tokens and eight more, if not given."""
    stop: list[Annotated[str, Field(min_length=1)]] = ["\n"]
    """Text ends before the first of these."""

    def check(self) -> None:
        text_score(self.metric, "", "")  # what cannot be imported shows before any long work
        self._prefix()
        for row in self.rows:
            self._fill(row)

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[list[Request]]:
        prefix = self._prefix()
        pairs = [self._fill(row) for row in self.rows]
        limit = self.max_new_tokens or 8 + max(
            len(tokenizer.encode(target, add_special_tokens=False)) for _, target in pairs
        )
        prompts = [tuple(tokenizer.encode(prefix + prompt)) for prompt, _ in pairs]
        return [[Generation(prompt, limit, tuple(self.stop))] for prompt in prompts]

    def score(self, answers: Mapping[int, Sequence[Any]]) -> TaskScore:
        return TaskScore.of_mean(
            [
                text_score(self.metric, text.strip(), self._fill(self.rows[index])[1].strip())
                for index, (text,) in answers.items()
            ]
        )

    def _prefix(self) -> str:
        return self.fewshot_prefix(lambda row: "".join(self._fill(row)))

    def _fill(self, row: Row) -> tuple[str, str]:
        return fill(self.prompt, row, self.where), fill(self.target, row, self.where)


class _Words:
    """Words of any script; rouge_score's own keeps only a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def text_score(metric: str, text: str, target: str) -> float:
    """How well a text meets its target, from 0 to 1."""
    if metric == "exact":
        return float(text == target)
    if metric == "copy":
        return LCSseq.normalized_similarity(text.split(), target.split())
    from rouge_score.rouge_scorer import RougeScorer  # it brings nltk, scikit-learn and pandas: 180 MiB

    return RougeScorer([metric], tokenizer=_Words()).score(target, text)[metric].fmeasure
