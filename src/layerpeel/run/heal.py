"""A short training of the best few candidates before the choice."""

from __future__ import annotations

import time

from layerpeel.config.run import RunConfig
from layerpeel.data.token_store import TokenStore
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.scores import LayerScores
from layerpeel.tasks.evaluation import evaluate
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student


def heal_candidates(
    student: Student, inputs: ScoringInputs, scores: LayerScores, config: RunConfig, texts: TokenStore
) -> None:
    """Removes each of the best few candidates on trial, distils for a few steps, and notes what the tasks lose then.

    Args:
        scores: of the candidates; gets their `healed` and `heal_seconds`.
        texts: as for `load_rows`.
    """
    assert config.score.heal and inputs.reference
    started = time.monotonic()
    step = TrainingRecipe(config.distill).step_tokens
    sizes = {"tokens_per_step": step, "tokens_per_round": config.score.heal.steps * step}
    distill = config.distill.model_copy(update=sizes)
    teacher = inputs.reference.aggregate(inputs.reference, config.aggregate)
    for layer in scores.ranked()[: config.score.heal.keep]:
        trial = student.fork()
        trial.remove([layer])
        description = f"healing without layer {layer}"
        train_student(trial, inputs.tokenizer, distill, seed=config.seed, description=description, texts=texts)
        evaluation = evaluate(trial.layerwise, inputs.tokenizer, inputs.tasks)
        scores.healed[layer] = teacher - evaluation.aggregate(inputs.reference, config.aggregate)
    scores.heal_seconds = time.monotonic() - started
