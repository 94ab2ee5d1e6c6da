"""Writes a student as a checkpoint, wherever its weights are."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.model.loading import teacher_options
from layerpeel.model.origin import teacher_origin
from layerpeel.model.removal import remove_from_files
from layerpeel.model.saving import save_model
from layerpeel.processes.distributed import from_main
from layerpeel.training.student import Student


def write_student(student: Student, tokenizer: PreTrainedTokenizerBase, config: RunConfig, folder: Path) -> None:
    """Writes a checkpoint in the dtypes of the teacher's; of layers that are streamed, from file to file.

    Args:
        config: of the teacher, with its revision pinned.
        folder: a checkpoint there is replaced once the new one is complete.

    Raises:
        RunError: what was written is not the student.
    """
    kept = student.kept_layers
    if not student.teacher.streamed:
        origin = teacher_origin(config).with_layers(kept.kept)
        save_model(student.model, tokenizer, folder, origin.dtype, origin)
        return
    trained = {name: value.detach for name, value in student.trained_state().items()}
    replaced = {name: stored.read for name, stored in student.replaced.items()} | trained
    options = teacher_options(config)
    from_main(partial(remove_from_files, config.teacher, kept.removed, folder, replaced=replaced, **options))
