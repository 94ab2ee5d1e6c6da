"""Which runtime `--against` names, and its answers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from layerpeel.errors import InputError, nearest
from layerpeel.export.verify.answers import Answers, Question
from layerpeel.export.verify.limits import PRECISIONS
from layerpeel.export.verify.llama_cpp import ask_gguf
from layerpeel.export.verify.reference import Reference
from layerpeel.export.verify.server import Server
from layerpeel.export.verify.worker import SCRIPTS, ask_worker

MARKS = {"model.onnx": "onnx", "openvino_model.xml": "openvino", "config.json": "transformers"}  # of a folder


@dataclass(frozen=True)
class RuntimeOptions:
    """How a runtime is reached.

    Attributes:
        python: an interpreter that has it, where it runs in Python.
        llama_cpp: a checkout or a build of llama.cpp, instead of the one on the PATH.
        runtime: of `SCRIPTS`, for a folder that several can read; by what is in it, if None.
        dtype: that vLLM computes in.
        model: the model's name on a server.
        trust_remote_code: whether code that comes with the model may run.
    """

    python: str = sys.executable
    llama_cpp: Path | None = None
    runtime: str | None = None
    dtype: str | None = None
    model: str | None = None
    trust_remote_code: bool = False


def ask(other: str, question: Question, reference: Reference, options: RuntimeOptions) -> Answers:
    """The answers of a GGUF file, a folder or a server.

    Raises:
        InputError: it is none of these, or its runtime is not there.
        RunError: the runtime cannot run it.
    """
    if other.startswith(("http://", "https://")):
        return Server(other, reference.tokenizer, options.model).ask(question)
    path = Path(other).expanduser()
    if path.is_file():
        return ask_gguf(path, question, reference, llama_cpp=options.llama_cpp, python=options.python)
    runtime = runtime_of(path, options.runtime)
    remote = options.trust_remote_code
    return ask_worker(runtime, path, question, options.python, dtype=options.dtype, trust_remote_code=remote)


def runtime_of(folder: Path, runtime: str | None) -> str:
    """The runtime that reads a folder.

    Raises:
        InputError: none does, or there is none of that name.
    """
    if not folder.is_dir():
        raise InputError(
            f"--against {folder}: there is no such file or folder",
            hint="give a .gguf file, a folder with a checkpoint, ONNX or OpenVINO model, or http://ADDRESS of a server",
        )
    if runtime:
        if runtime not in SCRIPTS:
            raise InputError(f"--runtime {runtime}: there is no such runtime{nearest(runtime, SCRIPTS)}")
        return runtime
    for name, marked in MARKS.items():
        if (folder / name).is_file():
            return marked
    raise InputError(
        f"--against {folder}: it holds none of {', '.join(MARKS)}",
        hint="name the folder that optimum or save_pretrained wrote",
    )


def check_precision(name: str | None) -> None:
    """Checks that limits are known for a precision.

    Raises:
        InputError: they are not.
    """
    if name is not None and name not in PRECISIONS:
        raise InputError(f"--precision {name}: there are no limits for it{nearest(name, PRECISIONS)}")


def checkpoint_of(student: str | os.PathLike[str]) -> str:
    """The checkpoint of a run, if that is what is named, else what is named.

    Raises:
        InputError: the run has not finished.
    """
    folder = Path(student).expanduser()
    if not (folder / "journal.jsonl").is_file():
        return str(folder) if folder.is_dir() else str(student)
    if not (folder / "student" / "config.json").is_file():
        raise InputError(
            f"{student}: the run has written no student yet",
            hint="finish it (layerpeel run), or export a round (layerpeel export RUN --round N -o FOLDER)",
        )
    return str(folder / "student")
