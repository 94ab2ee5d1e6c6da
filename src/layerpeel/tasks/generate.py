"""Generation: greedy text against a target."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from rapidfuzz.distance import LCSseq
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import AS_COUNT
from layerpeel.data.cells import TableRow, located
from layerpeel.data.tokenizing import encode_text
from layerpeel.errors import InputError
from layerpeel.inference.encoding import start_token
from layerpeel.inference.requests import Generation
from layerpeel.processes.progress import print_once
from layerpeel.tasks.base import FewShot, Sample
from layerpeel.tasks.scores import TaskScore
from layerpeel.tasks.templates import fill
from layerpeel.tasks.words import chunks, words

MARGIN = 8  # new tokens beyond those of a target: texts have more than one tokenization


class Generate(FewShot):
    """The mean over rows of the generated text's score against the target; both are stripped of outer whitespace."""

    prompt: str = "{prompt}"
    """A template over the row's columns."""
    target: str = "{target}"
    """A template over the row's columns."""
    metric: Literal["exact", "copy", "rouge1", "rouge2", "rougeL"] = "exact"
    """exact: the same text. copy: longest common subsequence of words, over the longer text's words. rouge*: F1 over
    words. Of scripts without spaces between words, such as Chinese and Thai, characters are counted as words."""
    max_new_tokens: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """The longest target's tokens and eight more, if not given. Prompts are cut at their beginning where the model's
    context has no room for them and for so many new tokens; if this is not given, for the row's own target."""
    stop: list[Annotated[str, Field(min_length=1)]] = ["\n"]
    """Text ends before the first of these."""

    def check(self) -> None:
        text_score(self.metric, "", "")  # a failing import shows before any long work
        self._prefix()
        for row in self.rows:
            _, target = self._fill(row)
            self._check_stops(target.strip(), row)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        prefix, pairs = self._prefix(), [self._fill(row) for row in self.rows]
        lengths = [len(tokenizer.encode(target, add_special_tokens=False)) for _, target in pairs]
        limit = self.max_new_tokens or MARGIN + max(lengths)
        samples = []
        for row, (prompt, target), length in zip(self.rows, pairs, lengths, strict=True):
            needed = None if self.max_new_tokens else MARGIN + length
            ids = encode_text(tokenizer, prefix + prompt) or [start_token(tokenizer)]
            request = Generation(tuple(ids), limit, tuple(self.stop), needed)
            samples.append(Sample([request], self._reference(target, tokenizer, row), located(row, self.data)))
        return samples

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        return TaskScore.of_mean(
            [
                text_score(self.metric, text.strip(), sample.reference)
                for sample, (text,) in zip(samples, answers, strict=True)
            ]
        )

    def _reference(self, target: str, tokenizer: PreTrainedTokenizerBase, row: TableRow) -> str:
        """A target as an answer can hold it: without the tokenizer's special tokens, which are left out of answers.

        Raises:
            InputError: nothing would be left.
        """
        text = target
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        for token in sorted({*map(str, tokenizer.all_special_tokens), *added}, key=len, reverse=True):
            text = text.replace(token, "")
        if target.strip() and not text.strip():
            raise InputError(
                f"{located(row, self.where)}: its target, {reprlib.repr(target)}, holds nothing but special tokens, "
                "which are left out of generated text",
                hint="leave such rows out, or give targets of text",
            )
        return text.strip()

    def _check_stops(self, target: str, row: TableRow) -> None:
        """Checks that a text which ends before the first stop can be the target.

        Raises:
            InputError: it cannot, and only the same text counts.
        """
        stop = next((stop for stop in self.stop if stop in target), None)
        if stop is None:
            return
        what = f"its target holds {stop!r}, and text ends before the first of those (stop)"
        if self.metric == "exact":
            raise InputError(
                f"{located(row, self.where)}: {what}, so no answer can be right",
                hint="set stop to what ends an answer, or shorten the target",
            )
        print_once(f"{self.where}: {what}: what comes after is not written ({located(row, self.data)} is the first)")

    def _prefix(self) -> str:
        return self.fewshot_prefix(lambda row: "".join(self._fill(row)))

    def _fill(self, row: TableRow) -> tuple[str, str]:
        return fill(self.prompt, row, self.where), fill(self.target, row, self.where)


class _Words:
    """A tokenizer for rouge_score that keeps words of any script; its default keeps only a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def text_score(metric: str, text: str, target: str) -> float:
    """The score of a text against its target by a metric of `Generate`, from 0 to 1."""
    if metric == "exact":
        return float(text == target)
    if metric == "copy":
        return LCSseq.normalized_similarity(chunks(text), chunks(target))
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, scikit-learn and pandas: 180 MiB

    return RougeScorer([metric], tokenizer=_Words()).score(target, text)[metric].fmeasure
