"""The student that is taken elsewhere: a checkpoint's, or that of a round of a run; and its teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpeel.errors import InputError
from layerpeel.export.outcomes import Outcome, remember
from layerpeel.export.student import export_student
from layerpeel.model.config_fields import text_config
from layerpeel.model.loading import load_config_of
from layerpeel.model.origin import local_folder, teacher_origin
from layerpeel.run.card import teacher_metadata
from layerpeel.run.folder import Run
from layerpeel.run.places import checked_teacher, find_places, teacher_place
from layerpeel.storage.outputs import absolute

SHARED = ("hidden_size", "vocab_size")  # fields that a student has in common with its teacher


class Source:
    """A student that is to be taken elsewhere.

    Args:
        path: the folder of a checkpoint, or of a run.
        round_: of a run: whose student; that of the result, if None.
        overrides: `teacher=PATH`, where the teacher is.

    Raises:
        InputError: it is neither.
    """

    def __init__(self, path: str, round_: int | None = None, overrides: list[str] | None = None) -> None:
        self.path, self.round, self.overrides = Path(path), round_, overrides or []
        self.run: Run | None = None
        if round_ is not None or not (self.path / "config.json").is_file():
            self.run = Run(path)
            find_places(self.run, self.overrides)

    @contextmanager
    def checkpoint(self, near: Path | None) -> Iterator[Path]:
        """The student's checkpoint: one that is there, or else one written for this.

        Args:
            near: beside which it is written, if it is; the folder of temporary files, if None.
        """
        run = self.run
        if run is None:
            yield self.path
        elif self.round is None and run.finish and (run.student_folder / "config.json").is_file():
            yield run.student_folder
        else:
            with tempfile.TemporaryDirectory(prefix="layerpeel-", dir=near and absolute(near).parent) as scratch:
                export_student(run, Path(scratch, "student"), self.round)
                yield Path(scratch, "student")

    def teacher(self, *, trust_remote_code: bool = False) -> Path:
        """The folder of its teacher's checkpoint.

        Args:
            trust_remote_code: whether code that comes with the models may run.

        Raises:
            InputError: it is gone, is not known, or is another.
        """
        if self.run:
            return teacher_origin(checked_teacher(self.run)).folder
        folder = local_folder(self._teacher_of_checkpoint())
        _check_alike(folder, self.path, trust_remote_code)
        return folder

    def keep(self, outcome: Outcome) -> None:
        """Lets the run remember what came of it, if it is a run's."""
        if self.run:
            remember(self.run, self.round, outcome)

    def _teacher_of_checkpoint(self) -> str:
        """Where the user says that it is, or what the model card names: a folder beside the student, or the hub's."""
        if self.overrides:
            return str(Path(teacher_place(self.overrides[-1])).expanduser())
        named = str(teacher_metadata(str(self.path)).get("base_model") or "")
        beside = absolute(self.path).parent / named
        if named and beside.is_dir():
            return str(beside)
        if "/" in named:
            return named
        raise InputError(
            f"--speed: {self.path} does not say where its teacher is" + (f" ({named})" if named else ""),
            hint="say it: --set teacher=PATH",
        )


def _check_alike(teacher: Path, student: Path, trust_remote_code: bool) -> None:
    """Checks that a checkpoint can be the teacher of a student.

    Raises:
        InputError: it cannot.
    """
    configs = [text_config(load_config_of(each, trust_remote_code=trust_remote_code)) for each in (teacher, student)]
    differing = [name for name in SHARED if len({getattr(config, name, None) for config in configs}) > 1]
    depths = [config.num_hidden_layers for config in configs]
    if depths[0] < depths[1]:
        differing.append("num_hidden_layers")
    if differing:
        teachers, students = (getattr(config, differing[0], None) for config in configs)
        raise InputError(
            f"{teacher} is not the teacher of {student}: {differing[0]} is {teachers}, and {students} in the student",
            hint="say where the teacher is: --set teacher=PATH",
        )
