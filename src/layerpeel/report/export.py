"""The student of any round as a full Hugging Face checkpoint, in a folder or on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from layerpeel.errors import InputError, RunError
from layerpeel.journal import Run
from layerpeel.models import load_teacher, save_model, stored_dtype
from layerpeel.report.card import write_card
from layerpeel.report.gather import result_round
from layerpeel.report.measure import rebuild
from layerpeel.report.text import one_line


def export_student(run: Run, folder: Path, round_: int | None = None) -> int:
    """Writes a round's student with its model card, in the dtype of the teacher's checkpoint.

    Args:
        round_: the run's result, unless named: of a finished run that is the checkpoint it has, which needs no teacher.

    Returns:
        the round.

    Raises:
        InputError: there is no such round, or no teacher any more.
        RunError: the round's files are gone or damaged.
    """
    if round_ is None and run.finish and (run.student_folder / "config.json").is_file():
        run.check_files(run.finish)
        shutil.copytree(run.student_folder, folder, dirs_exist_ok=True)
        return result_round(run)
    round_ = result_round(run) if round_ is None else round_
    if not 1 <= round_ <= len(run.rounds):
        there = f"it has rounds 1 to {len(run.rounds)}" if run.rounds else "it has finished none yet"
        raise InputError(
            f"{run.folder} has no round {round_}: {there}", hint="`layerpeel ls` shows what runs have done"
        )
    teacher, tokenizer = load_teacher(run.config)
    student = rebuild(run, teacher, round_)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(student.model, tokenizer, folder, stored_dtype(run.config.teacher))
    write_card(run, folder, round_)
    return round_


def push(folder: Path, repository: str, api: HfApi | None = None) -> str:
    """Uploads a checkpoint to the hub, to a private repository if it is a new one; gives its address.

    Args:
        api: that of the user who is logged in, if not given.

    Raises:
        RunError: the hub cannot be reached, or refuses.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A student made by layerpeel")
    except Exception as error:  # the hub's refusals, and whatever the client's transport has for a lost network
        raise RunError(
            f"--push {repository}: nothing was uploaded ({one_line(error, 300)})",
            hint=f"the checkpoint is in {folder}; log in with `hf auth login`, check the name and the network",
        ) from None
    return str(address)
