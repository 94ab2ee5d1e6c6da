"""The commands that take a student to where it will run: `export` and `verify`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerpeel.cli.app import importing
from layerpeel.cli.inputs import AsJson, Teacher, TrustRemoteCode, check_new_folder, expand_home
from layerpeel.cli.output import stdout
from layerpeel.cli.verdicts import print_outcome
from layerpeel.errors import InputError
from layerpeel.processes.progress import shown

if TYPE_CHECKING:
    from layerpeel.export.outcomes import Outcome
    from layerpeel.export.runtimes import Target
    from layerpeel.export.source import Source

Python = Annotated[
    str | None, typer.Option("--python", metavar="PATH", help="The interpreter of the environment with the runtime.")
]
LlamaCppFolder = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        parser=expand_home,
        metavar="PATH",
        help="A checkout or build of llama.cpp; what is on the PATH, or the package xllamacpp, if not given.",
    ),
]


OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="Where to write the student."),
]
Round = Annotated[int | None, typer.Option("--round", help="Of which round; the result if not given.")]
Push = Annotated[
    str | None, typer.Option("--push", metavar="REPO", help="Upload it to the hub, too (private, if new).")
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="RUNTIME",
        help="gguf, onnx or openvino: write it for that, and verify it there; vllm: verify it there.",
    ),
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", metavar="KINDS", help="GGUF files beside bf16, as q4_k_m,q8_0.")
]
Speed = Annotated[
    bool, typer.Option("--speed", help="With --to gguf or vllm: time it beside its teacher, too, once it is verified.")
]
Against = Annotated[
    str,
    typer.Option(
        "--against",
        metavar="OTHER",
        help="A GGUF file; a folder with a checkpoint, an ONNX or OpenVINO model; http://ADDRESS of a server.",
    ),
]
RuntimeName = Annotated[
    str | None, typer.Option("--runtime", help="For a checkpoint: transformers or vllm; transformers if not given.")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="Whose limits count: fp32, 16-bit, 8-bit or 4-bit; what the runtime says."),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="The text to compare on; a bundled one if not given.")
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", min=16, help="Of the text; 512, or 256 more than the attention window, if not given."),
]


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder; with --to also a checkpoint's.")],
    output_: OutputFolder = None,
    round_: Round = None,
    set_: Teacher = [],  # noqa: B006
    repository: Push = None,
    to: To = None,
    quantize: Quantize = None,
    llama_cpp: LlamaCppFolder = None,
    python: Python = None,
    speed: Speed = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write the student of a round as a full checkpoint with its model card, or for another runtime, verified there."""
    with importing():
        from layerpeel.export.runtimes import Target
        from layerpeel.export.source import Source
        from layerpeel.export.verify.runtimes import RuntimeOptions

    if to is None:
        _refuse_without_target(quantize, llama_cpp, python, as_json, speed)
        _export_checkpoint(source, _needed(output_), round_, set_, repository)
        return
    if repository:
        raise InputError(f"--push {repository}: with --to nothing is uploaded", hint="leave one of them out")
    options = RuntimeOptions(python or sys.executable, llama_cpp, trust_remote_code=trust_remote_code)
    target = Target.of(to, quantize, options)
    folder = _needed(output_) if target.writes else None
    if folder is not None:
        check_new_folder(folder, source)
    elif output_ is not None:
        raise InputError(f"--output {output_}: vLLM reads the checkpoint, nothing is written", hint="leave it out")
    student = Source(source, round_, set_)
    if speed:
        target.check_timed()
    teacher = student.teacher(trust_remote_code=trust_remote_code) if speed else None
    _export_to(student, folder, target, teacher, as_json)


def verify(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A checkpoint's folder, or a run's.")],
    against: Against,
    python: Python = None,
    llama_cpp: LlamaCppFolder = None,
    runtime: RuntimeName = None,
    precision: Precision = None,
    text: TextFile = None,
    tokens: Tokens = None,
    dtype: Annotated[str, typer.Option(help="That the student is computed in, here.")] = "float32",
    model: Annotated[str | None, typer.Option(help="The model's name on a server; its first.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare a student with what another runtime makes of it; exit code 1 if that is not rounding."""
    with importing():
        from layerpeel.export.outcomes import Outcome, remember
        from layerpeel.export.verify.reference import Reference
        from layerpeel.export.verify.runtimes import RuntimeOptions, ask, check_precision, checkpoint_of
        from layerpeel.export.verify.text import make_question, read_text
        from layerpeel.export.verify.verifying import verify as verify_answers
        from layerpeel.run.folder import Run

    check_precision(precision)
    passage = read_text(text)
    folder = Path(student).expanduser()
    run = Run(folder) if (folder / "journal.jsonl").is_file() else None
    reference = Reference(checkpoint_of(student), dtype, trust_remote_code=trust_remote_code)
    question = make_question(passage, reference.tokenizer, reference.config, tokens)
    options = RuntimeOptions(
        python or sys.executable, llama_cpp, runtime=runtime, model=model, trust_remote_code=trust_remote_code
    )
    verdict = verify_answers(reference, question, ask(against, question, reference, options), precision)
    outcome = Outcome(against, verdict)
    if run:
        remember(run, None, outcome)
    _print([outcome], as_json)
    _exit([outcome])


def _export_checkpoint(source: str, folder: Path, round_: int | None, set_: list[str], repository: str | None) -> None:
    from layerpeel.export.hub import push
    from layerpeel.export.student import export_student
    from layerpeel.run.folder import Run
    from layerpeel.run.places import find_places

    opened = Run(source)
    find_places(opened, set_)
    check_new_folder(folder, opened.config.teacher)
    number = export_student(opened, folder, round_)
    stdout.print(f"student  {shown(folder)} (round {number})", soft_wrap=True)
    if repository:
        stdout.print(f"hub      {shown(push(folder, repository))}", soft_wrap=True)


def _export_to(student: Source, folder: Path | None, target: Target, teacher: Path | None, as_json: bool) -> None:
    from layerpeel.export.runtimes import export_to

    outcomes: dict[str, Outcome] = {}
    try:
        with student.checkpoint(folder) as checkpoint:
            for outcome in export_to(checkpoint, folder, target, Path(os.path.abspath(student.path)).name, teacher):
                student.keep(outcome)
                outcomes[outcome.path] = outcome
    finally:  # what was verified is said, even if what came later failed
        if outcomes:
            _print(list(outcomes.values()), as_json)
    _exit(list(outcomes.values()))


def _needed(folder: Path | None) -> Path:
    if folder is None:
        raise InputError("--output is missing: where to write the student", hint="as in -o student")
    return folder


def _refuse_without_target(
    quantize: str | None, llama_cpp: Path | None, python: str | None, as_json: bool, speed: bool
) -> None:
    given = {"--quantize": quantize, "--llama-cpp": llama_cpp, "--python": python, "--json": as_json, "--speed": speed}
    for name, value in given.items():
        if value:
            raise InputError(f"{name}: only for another runtime", hint="say which, as in --to gguf")


def _print(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"path": outcome.path} | outcome.to_json() for outcome in outcomes]))
        return
    for number, outcome in enumerate(outcomes):
        if number:
            stdout.print()
        print_outcome(outcome)


def _exit(outcomes: list[Outcome]) -> None:
    """Exits with 1 if one is wrong."""
    if not all(outcome.verdict.is_right for outcome in outcomes):
        sys.exit(1)
