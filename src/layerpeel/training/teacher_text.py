"""A run's config with the text that its teacher writes: sampled before it is first read, and kept beside the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.teacher_text import TeacherWriter, WrittenText
from layerpeel.model.digests import digests


def with_teacher_text(
    config: RunConfig,
    model: PreTrainedModel | LayerwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    removals: int = 1,
    training: bool = True,
    scoring: bool = True,
    teacher_files: Mapping[str, str] | None = None,
) -> tuple[RunConfig, list[WrittenText]]:
    """A config in which each source `from: teacher` is the folder of the text; and the texts, written if need be.

    Args:
        model: the teacher.
        folder: where texts are kept.
        removals: how many layers go, by which the trainings' need of text is known.
        teacher_files: a digest of each of the teacher's files, if they are known.
        training, scoring: which of the two will read text; what neither reads is not written.

    Raises:
        InputError, RunError, Interrupted: as for `TeacherWriter.resolve`.
    """
    if not config.has_teacher_text:
        return config, []
    writer = TeacherWriter(
        model,
        tokenizer,
        folder,
        teacher=dict(teacher_files or digests(config.teacher, config.revision)),
        length=config.distill.sequence_length,
        tokens=max(training * config.distill.text_tokens(removals), scoring * config.score.tokens),
        seed=config.seed,
        memory=config.score.memory,
    )
    resolved = config.model_copy(deep=True)
    if training or not config.score.text:
        resolved.distill.text = writer.resolve(config.distill.text)
    if scoring and config.score.text:
        resolved.score.text = writer.resolve(config.score.text)
    return resolved, list(writer.written.values())
