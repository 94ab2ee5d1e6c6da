"""Asks a runtime in another Python, by one of the scripts of `export/workers/`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerpeel.errors import InputError, RunError
from layerpeel.export.verify.answers import Answers, Question, read_arrays
from layerpeel.export.verify.limits import precision_of
from layerpeel.processes.text import one_line

WORKERS = Path(__file__).parents[1] / "workers"
SCRIPTS = {  # runtime: script, and what to install for it
    "transformers": ("with_transformers", "torch transformers"),
    "vllm": ("with_vllm", "vllm"),
    "onnx": ("with_onnxruntime", "onnxruntime tokenizers"),
    "openvino": ("with_openvino", "openvino tokenizers"),
}


def ask_worker(runtime: str, model: Path, question: Question, python: str = sys.executable, **options: Any) -> Answers:
    """Runs a model in a runtime of another Python.

    Args:
        runtime: of `SCRIPTS`.
        model: the folder that the runtime reads.
        python: an interpreter of an environment that has the runtime.
        options: of the request: `dtype`, `trust_remote_code`.

    Raises:
        InputError: there is no such Python, or it has no such runtime.
        RunError: the runtime cannot load or run the model.
    """
    request = {
        "text": question.text,
        "token_ids": question.token_ids,
        "positions": question.positions,
        "most_likely": question.most_likely,
        "prompt": question.prompt,
        "new_tokens": question.new_tokens,
        "dtype": None,
        "trust_remote_code": False,
    }
    with exchanged(runtime, model, request | options, python) as (folder, answered):
        ids, log_probs = read_arrays(folder, answered["runtime"])
    precision = precision_of(answered["precision"]) if answered["precision"] else None
    return Answers(
        answered["runtime"], precision, answered["token_ids"], ids, log_probs, answered["greedy"], answered["facts"]
    )


@contextmanager
def exchanged(
    runtime: str, model: Path, request: dict[str, Any], python: str = sys.executable
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder that a runtime in another Python answers in (see `workers/exchange.py`), and its answers.

    Raises:
        InputError: there is no such Python, or it has no such runtime.
        RunError: the runtime cannot load or run the model.
    """
    script, packages = SCRIPTS[runtime]
    with tempfile.TemporaryDirectory(prefix="layerpeel-") as name:
        folder = Path(name)
        content = json.dumps({"model": str(model.absolute())} | request)
        (folder / "request.json").write_text(content, encoding="utf-8")
        call_python(python, [str(WORKERS / "exchange.py"), script, name], f"{runtime}, {model}", packages)
        yield folder, json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def call_python(python: str, arguments: list[str], what: str, packages: str) -> str:
    """Runs a script in another Python, and returns what it printed.

    Args:
        what: it does, for messages.
        packages: that it needs, for the hint.

    Raises:
        InputError: there is no such Python, or it lacks a package.
        RunError: the script failed.
    """
    try:
        done = subprocess.run(
            [python, *arguments], capture_output=True, text=True, errors="replace", env=environment_for(python)
        )
    except OSError as error:
        raise InputError(
            f"--python {python}: it cannot be started ({error.strerror})",
            hint="give the interpreter of an environment, such as envs/vllm/bin/python",
        ) from None
    if done.returncode == 0:
        return done.stdout
    missing = re.findall(
        r"(?:ModuleNotFoundError|PackageNotFoundError)\b.*?'?([\w.]+)'?\s*$", done.stderr, re.MULTILINE
    )
    if missing:
        raise InputError(f"{what}: {python} has no package {missing[-1]}", hint=f"{python} -m pip install {packages}")
    raise RunError(f"{what} failed: {last_words(done.stderr or done.stdout)}", hint=f"it ran in {python}")


def environment_for(python: str) -> dict[str, str]:
    """The variables that a Python is started with: the module path of this one is not another's."""
    variables = dict(os.environ)
    if Path(python).absolute() != Path(sys.executable).absolute():
        variables.pop("PYTHONPATH", None)
    return variables


def last_words(output: str) -> str:
    """The last line of a log that is not empty, without its colours, shortened."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
    return one_line(lines[-1], 300) if lines else "it printed nothing"
