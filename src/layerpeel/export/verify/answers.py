"""What a runtime is asked about a student, and what it answers.

Shapes: T tokens of the text, P compared positions, K most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerpeel.errors import RunError

NEVER = -100.0  # stands for log-probabilities of minus infinity
UNTOLD = -2  # stands for the id of a token that is given as a text that several tokens have
PROMPT_TOKENS, NEW_TOKENS = 32, 32  # of the greedy continuation
MOST_LIKELY = 100  # tokens whose log-probabilities are compared, where a runtime gives so many


@dataclass(frozen=True)
class Question:
    """A text, and what is asked about it.

    Attributes:
        text: to be tokenised by the runtime.
        token_ids: [T], the text by the student's tokenizer.
        positions: [P] of 0..T-2, ascending: the distribution of the token after each is compared.
        most_likely: K, log-probabilities asked at each position.
        new_tokens: of the greedy continuation of `prompt`.
    """

    text: str
    token_ids: list[int]
    positions: list[int]
    most_likely: int = MOST_LIKELY
    new_tokens: int = NEW_TOKENS

    @property
    def prompt(self) -> list[int]:
        return self.token_ids[:PROMPT_TOKENS]


@dataclass(frozen=True)
class Answers:
    """What a runtime makes of a question.

    Attributes:
        runtime: its name and version.
        precision: of the weights that it runs, as `limits.PRECISIONS` has them; None if it does not say.
        token_ids: [T'], its tokenisation of the text; None if it gives none.
        top_ids: [P, K], the most likely next tokens at each position; -1 in unused places, or `UNTOLD`.
        top_log_probs: [P, K], their log-probabilities.
        greedy: the greedy continuation, as token ids or as text; None if there is none.
        facts: what its model's config or header says, by the names of `facts.facts_of`.
    """

    runtime: str
    precision: str | None
    token_ids: list[int] | None
    top_ids: np.ndarray
    top_log_probs: np.ndarray
    greedy: list[int] | str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def pack_top(rows: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of token id and log-probability at each position, as `top_ids` and `top_log_probs`."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), -1, dtype=np.int64)
    log_probs = np.full((len(rows), width), NEVER, dtype=np.float32)
    for row, pairs in enumerate(rows):
        for column, (token, log_prob) in enumerate(pairs):
            ids[row, column], log_probs[row, column] = token, max(log_prob, NEVER)
    return ids, log_probs


def read_arrays(folder: Path, runtime: str) -> tuple[np.ndarray, np.ndarray]:
    """The `top_ids` and `top_log_probs` that a worker wrote.

    Raises:
        RunError: they hold what is no number.
    """
    ids, log_probs = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("top_ids", "top_log_probs"))
    if np.isnan(log_probs).any():
        raise RunError(
            f"{runtime}: the log-probabilities are no numbers (NaN)",
            hint="its weights overflow in the dtype that it computes in, or are damaged",
        )
    return ids, np.maximum(log_probs, NEVER)
