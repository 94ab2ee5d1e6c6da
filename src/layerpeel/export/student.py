"""Writes the student of any round as a full Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerpeel.errors import InputError
from layerpeel.inference.loading import load_layerwise
from layerpeel.run.card import write_card
from layerpeel.run.folder import Run
from layerpeel.run.places import checked_teacher
from layerpeel.storage.files import write_folder
from layerpeel.training.writing import write_student


def export_student(run: Run, folder: Path, round_: int | None = None) -> int:
    """Writes a round's student with its model card, in the dtype of the teacher's checkpoint.

    Args:
        round_: the round; the run's result if not given. The result of a finished run is copied from the run's folder,
            which needs no teacher.

    Returns:
        the round.

    Raises:
        InputError: there is no such round, or the teacher is gone.
        RunError: the round's files are gone or damaged.
    """
    if round_ is None and run.finish and (run.student_folder / "config.json").is_file():
        run.check_files(run.finish)

        def copy(partial: Path) -> None:
            shutil.copytree(run.student_folder, partial, dirs_exist_ok=True)

        write_folder(folder, copy)
        return run.result_round
    round_ = run.result_round if round_ is None else round_
    if not 1 <= round_ <= len(run.rounds):
        rounds = f"it has rounds 1 to {len(run.rounds)}" if run.rounds else "it has finished none yet"
        raise InputError(
            f"{run.folder} has no round {round_}: {rounds}", hint="`layerpeel ls` shows what runs have done"
        )
    config = checked_teacher(run)
    teacher, tokenizer = load_layerwise(config, stream=config.streams)
    student = run.student_of(teacher, round_)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_student(student, tokenizer, config, folder)
    write_card(run, folder, round_)
    return round_
