"""The rows of text of a training: each goes on where the one before stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.config.distill import Packing
from layerpeel.config.run import RunConfig
from layerpeel.data.batches import ROWS_AHEAD, load_rows
from layerpeel.data.rows import Rows
from layerpeel.data.token_store import TokenStore
from layerpeel.processes.progress import console, print_once
from layerpeel.storage.files import json_digest
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.result import TrainingSummary
from layerpeel.training.student import Student

# What has no effect on the steps of a training, or none but on the rows that it reads.
WITHOUT_EFFECT = {"save_every", "teacher_cache_size", "when", "last_pass", "text"}


@dataclass(frozen=True)
class TrainingText:
    """Which rows of the text a training reads.

    Attributes:
        recipe: of the training.
        packing: how documents become rows.
        skip: how many real tokens of the text others have read before.
    """

    recipe: TrainingRecipe
    packing: Packing
    skip: int

    @classmethod
    def after(cls, before: Iterable[TrainingSummary], recipe: TrainingRecipe, student: Student) -> TrainingText:
        """Goes on after other trainings of a student, or begins again, as `distill.fresh_text` says."""
        packing = recipe.packing(student.teacher)
        if packing != recipe.config.packing:
            console.print(
                "distill.packing: this model cannot keep documents of a row apart; one document a row, padded "
                "(packing: wrapped would fill the rows)"
            )
        return cls(recipe, packing, sum(each.tokens for each in before) if recipe.config.fresh_text else 0)

    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int, texts: TokenStore | None = None) -> Rows:
        """Reads and tokenises the rows, and says how full they are.

        Args:
            texts: as for `load_rows`.

        Raises:
            InputError: there is no text.
        """
        rows = load_rows(
            self.recipe.config.text,
            tokenizer,
            sequence_length=self.recipe.config.sequence_length,
            packing=self.packing,
            max_tokens=self.recipe.config.tokens_per_round,
            seed=seed,
            skip_tokens=self.skip,
            texts=texts,
        )
        steps = f"{self.recipe.steps():,} step{'s' * (self.recipe.steps() > 1)} of {self.recipe.step_tokens:,} tokens"
        print_once(f"{steps}: rows {rows.tokens / rows.mask.numel():.0%} full".replace("%", " %"))
        return rows

    def settings(self, rows: Rows, seed: int, round_number: int) -> str:
        """A hash of what the steps of the training depend on, but for the weights.

        They are the same steps in any number of processes, which share the rows of each.

        Args:
            rows: what `load` gave.
        """
        fields = self.recipe.config.model_dump(mode="json", exclude=WITHOUT_EFFECT)
        return settings_hash(fields, rows.digest(), seed, round_number)


def tokenize_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase, texts: TokenStore, removals: int) -> None:
    """Tokenises all the text that the repairs and trainings of so many removals read, as far as it is not there.

    Raises:
        InputError, Interrupted: as for `TokenStore.reader`.
    """
    distill = config.distill
    if tokens := distill.text_tokens(removals):
        rows = removals + 1 + ROWS_AHEAD  # each training may exceed its tokens by a row
        texts.reader(distill.text, tokenizer, config.seed, tokens + rows * distill.sequence_length)


def settings_hash(*values: Any) -> str:
    """A hash of whatever work depends on; rows of text by their digest, as the same path may lead to others later."""
    return json_digest(values)
