"""Takes a student into a runtime, and verifies there what came of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from layerpeel.errors import InputError, nearest
from layerpeel.export.gguf import LlamaCpp, parse_kinds, write_ggufs
from layerpeel.export.outcomes import Outcome, bytes_of
from layerpeel.export.timing import TURNS, Load, Rate, time_beside, time_gguf, time_vllm
from layerpeel.export.verify.llama_cpp import check_server
from layerpeel.export.verify.reference import Reference
from layerpeel.export.verify.runtimes import RuntimeOptions, ask
from layerpeel.export.verify.text import make_question, read_text
from layerpeel.export.verify.verifying import verify, with_name
from layerpeel.export.verify.worker import call_python
from layerpeel.model.side_files import is_carried
from layerpeel.processes.progress import console
from layerpeel.storage.files import partial_of, remove_paths, write_folder, write_json
from layerpeel.storage.outputs import absolute

RECORD = "verified.json"
OPTIMUM = {  # the subcommand of optimum-cli, and what to install for it
    "onnx": ("onnx", "optimum-onnx[onnxruntime] torch"),
    "openvino": ("openvino", "optimum-intel[openvino] torch"),
}
TARGETS = ("gguf", "onnx", "openvino", "vllm")


@dataclass(frozen=True)
class Target:
    """Where a student is to go.

    Attributes:
        runtime: of `TARGETS`.
        kinds: of GGUF files.
        options: how the runtime is reached.
        llama_cpp: the tools that write GGUF files; None for another runtime.
    """

    runtime: str
    kinds: list[str]
    options: RuntimeOptions
    llama_cpp: LlamaCpp | None = None

    @classmethod
    def of(cls, runtime: str, quantize: str | None, options: RuntimeOptions) -> Target:
        """Checks what can be checked before the work.

        Raises:
            InputError: there is no such runtime or kind, or no llama.cpp.
        """
        if runtime not in TARGETS:
            raise InputError(f"--to {runtime}: there is no such runtime{nearest(runtime, TARGETS)}")
        if runtime != "gguf":
            if quantize:
                raise InputError(f"--quantize {quantize}: only GGUF files are quantised", hint="use --to gguf")
            return cls(runtime, [], replace(options, runtime=runtime))
        kinds = parse_kinds(quantize)
        tools = LlamaCpp(options.llama_cpp, kinds, options.python)
        check_server(options.llama_cpp, options.python)
        return cls(runtime, kinds, options, tools)

    @property
    def writes(self) -> bool:
        """Whether anything is written for it: vLLM reads the checkpoint as it is."""
        return self.runtime != "vllm"

    def check_timed(self) -> None:
        """Checks that students can be timed in it.

        Raises:
            InputError: they cannot.
        """
        if self.runtime not in TURNS:
            raise InputError(f"--speed: nothing is timed in {self.runtime}", hint=f"only in {' and '.join(TURNS)}")


def export_to(
    checkpoint: Path, folder: Path | None, target: Target, name: str, teacher: Path | None = None
) -> Iterator[Outcome]:
    """Writes a student for a runtime and verifies each file of it, then times those that are right.

    The files are in their place, whole, before the first is verified. What came of them is kept beside them.

    Args:
        folder: a new or empty one; None for a runtime that reads the checkpoint.
        name: the first part of the names of GGUF files.
        teacher: a checkpoint, beside which the student is timed; None if it is not to be.

    Yields:
        what came of each file, one after another; and once more when it has been timed.

    Raises:
        InputError: the runtime cannot be told what the student is.
        RunError: a converter fails, or a runtime says no time.
    """
    outcomes: dict[str, Outcome] = {}

    def kept(outcome: Outcome) -> Outcome:
        outcomes[Path(outcome.path).name] = outcome
        if folder is not None:
            write_json(folder / RECORD, {name: each.to_json() for name, each in outcomes.items()})
        return outcome

    paths = [checkpoint] if folder is None else _write(checkpoint, folder, target, name)
    reference = Reference(checkpoint, trust_remote_code=target.options.trust_remote_code)
    question = make_question(read_text(None), reference.tokenizer, reference.config)
    for path in paths:
        console.print(f"verifying {path.name}", style="dim", markup=False)
        verdict = verify(reference, question, ask(str(path), question, reference, target.options))
        yield kept(Outcome(str(path), with_name(verdict, path.name) if len(paths) > 1 else verdict))
    if teacher is not None:
        load = Load.of(question)
        del reference  # the memory is for what is timed
        yield from map(kept, _time(list(outcomes.values()), teacher, folder, target, load))


def _time(outcomes: list[Outcome], teacher: Path, folder: Path | None, target: Target, load: Load) -> Iterator[Outcome]:
    """Times the files that are right beside the teacher's, which are made for this and removed."""
    options = target.options

    def measure(path: Path) -> Rate:
        if target.llama_cpp:
            return time_gguf(path, load, options.llama_cpp, options.python)
        return time_vllm(path, load, options.python, options.dtype, trust_remote_code=options.trust_remote_code)

    if not any(outcome.verdict.is_right for outcome in outcomes):
        return
    with tempfile.TemporaryDirectory(prefix="layerpeel-", dir=folder and absolute(folder).parent) as scratch:
        files = [teacher]
        if target.llama_cpp:
            console.print("writing the teacher's files, to time them", style="dim")
            files = write_ggufs(teacher, Path(scratch), "teacher", target.kinds, target.llama_cpp)
        for outcome, file in zip(outcomes, files, strict=True):
            if outcome.verdict.is_right:
                speed = time_beside(measure, file, Path(outcome.path), load, TURNS[target.runtime])
                yield replace(outcome, speed=speed, teacher_bytes=bytes_of(file))


def _write(checkpoint: Path, folder: Path, target: Target, name: str) -> list[Path]:
    """Writes the files, whole or not at all, and returns what is to be verified."""
    written: list[Path] = []

    def write(partial: Path) -> None:
        if target.llama_cpp:
            written.extend(write_ggufs(checkpoint, partial, name, target.kinds, target.llama_cpp))
        else:
            _optimum(checkpoint, partial, target)

    with _cleaned(folder):
        write_folder(folder, write)
    return [folder / path.name for path in written] or [folder]


def _optimum(checkpoint: Path, folder: Path, target: Target) -> None:
    """Exports by optimum, in the environment that has it: full precision, with key-value caches."""
    command, packages = OPTIMUM[target.runtime]
    python = target.options.python
    console.print(f"optimum-cli export {command}", style="dim")
    arguments = ["-m", "optimum.commands.optimum_cli", "export", command, "--model", str(checkpoint.absolute())]
    arguments += ["--task", "text-generation-with-past"]
    if command == "openvino":
        arguments += ["--weight-format", "fp32"]
    if target.options.trust_remote_code:
        arguments.append("--trust-remote-code")
    call_python(python, [*arguments, str(folder.absolute())], f"optimum-cli export {command}", packages)
    for file in checkpoint.iterdir():  # its transformers may not know the tokenizer's class, and then leaves it out
        if file.is_file() and is_carried(file.name) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


@contextmanager
def _cleaned(folder: Path) -> Iterator[None]:
    """Leaves nothing half written, now or from a process that was killed."""
    remove_paths(partial_of(folder))
    try:
        yield
    finally:
        remove_paths(partial_of(folder))
