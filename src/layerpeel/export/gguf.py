"""Writes a student as GGUF files, by the user's llama.cpp: converted, told which layers have a window, quantised."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerpeel.errors import InputError, RunError, nearest
from layerpeel.export.verify.gguf_header import file_kinds, import_gguf, read_header
from layerpeel.export.verify.llama_cpp import find_program
from layerpeel.export.verify.worker import call_python, last_words
from layerpeel.model.layer_cycles import gguf_pattern
from layerpeel.model.loading import load_config_of
from layerpeel.processes.progress import console
from layerpeel.storage.files import whole_file

UNQUANTISED = ("bf16", "f16", "f32")
PATTERN = "{arch}.attention.sliding_window_pattern"


class LlamaCpp:
    """The converter and the quantiser of a llama.cpp.

    Args:
        folder: a checkout with a build, or a build; what is on the PATH, if None.
        python: that the converter runs in: it needs torch and transformers.

    Raises:
        InputError: it has no converter, or no quantiser where one is needed.
    """

    def __init__(self, folder: Path | None, kinds: list[str], python: str = sys.executable) -> None:
        self.python = python
        self.converter = self._find("convert_hf_to_gguf.py", folder, "it comes with the source of llama.cpp")
        self.quantiser = None
        if any(kind not in UNQUANTISED for kind in kinds):
            self.quantiser = self._find("llama-quantize", folder, "cmake --build build --target llama-quantize")

    @staticmethod
    def _find(name: str, folder: Path | None, hint: str) -> Path:
        program = find_program(name, folder)
        if program is None:
            place = f"--llama-cpp {folder} holds no" if folder else "the PATH has no"
            raise InputError(
                f"{place} {name}: {hint}", hint="give --llama-cpp FOLDER: a checkout of llama.cpp with its build"
            )
        return program

    def convert(self, checkpoint: Path, file: Path, kind: str) -> None:
        """Writes a checkpoint as a GGUF file of one of the `UNQUANTISED` kinds, with its own pattern of windows.

        Raises:
            InputError: llama.cpp cannot say the pattern.
            RunError: the converter fails.
        """
        pattern = gguf_pattern(load_config_of(checkpoint))
        console.print(f"converting to {kind}", style="dim")
        arguments = [str(self.converter), str(checkpoint), "--outfile", str(file), "--outtype", kind]
        call_python(self.python, arguments, "convert_hf_to_gguf.py", "torch transformers sentencepiece")
        if pattern is not None:
            write_pattern(file, pattern)

    def quantise(self, source: Path, file: Path, kind: str) -> None:
        """Writes a GGUF file with fewer bits a weight.

        Raises:
            RunError: the quantiser fails, or has no such kind.
        """
        console.print(f"quantising to {kind}", style="dim")
        command = [str(self.quantiser), str(source), str(file), kind.upper()]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not file.is_file():
            raise RunError(f"llama-quantize {kind.upper()} failed: {last_words(done.stderr or done.stdout)}")


def parse_kinds(text: str | None) -> list[str]:
    """The kinds of `--quantize`, such as q4_k_m,q8_0, in lower case.

    Raises:
        InputError: one is named twice or is no kind that GGUF files have.
    """
    kinds = [kind.strip().lower() for kind in (text or "").split(",") if kind.strip()]
    available = set(file_kinds().values())
    for kind in kinds:
        if kind not in available:
            raise InputError(f"--quantize {text}: there is no '{kind}'{nearest(kind, available)}")
        if kinds.count(kind) > 1:
            raise InputError(f"--quantize {text}: {kind} is named twice", hint="name each once")
    return kinds


def write_ggufs(checkpoint: Path, folder: Path, name: str, kinds: list[str], llama_cpp: LlamaCpp) -> list[Path]:
    """Writes a checkpoint as GGUF files into a folder: one as it is stored, bf16, and one of each kind.

    Returns:
        the files, the unquantised one first.
    """
    base = next((kind for kind in kinds if kind in UNQUANTISED), "bf16")
    files = [folder / f"{name}-{kind}.gguf" for kind in [base, *(kind for kind in kinds if kind != base)]]
    llama_cpp.convert(checkpoint, files[0], base)
    for file, kind in zip(files[1:], (kind for kind in kinds if kind != base), strict=True):
        if kind in UNQUANTISED:
            llama_cpp.convert(checkpoint, file, kind)
        else:
            llama_cpp.quantise(files[0], file, kind)
    return files


def write_pattern(file: Path, pattern: list[bool]) -> None:
    """Writes into a GGUF file's header which layers have an attention window, in place of what it says of that."""
    if read_header(file).facts.get("sliding_layers") == pattern:
        return
    gguf = import_gguf()
    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    with whole_file(file) as partial:
        writer = gguf.GGUFWriter(partial, architecture, endianess=reader.endianess)
        for field, kind, value, inner in _fields(gguf, reader, PATTERN.format(arch=architecture)):
            writer.add_key_value(field, value, kind, sub_type=inner)
        writer.add_sliding_window_pattern(pattern)
        for tensor in reader.tensors:
            size, dtype = tensor.data.nbytes, tensor.data.dtype
            writer.add_tensor_info(tensor.name, tensor.data.shape, dtype, size, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
        writer.close()


def _fields(gguf: Any, reader: Any, but: str) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, type, value and type of elements of each field of a header that a writer does not write by itself."""
    for name, field in reader.fields.items():
        if name not in ("general.architecture", but) and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            yield name, field.types[0], field.contents(), inner
