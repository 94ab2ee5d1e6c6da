"""Reads the header of a GGUF file: its precision, and what it says of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpeel.errors import InputError, reason_of
from layerpeel.export.verify.limits import precision_of


@dataclass(frozen=True)
class Header:
    """What a GGUF file says.

    Attributes:
        architecture: llama.cpp's name of the family.
        precision: of most of its weights, as `limits.PRECISIONS` has them; None for another.
        kind: its quantisation, as `--quantize` names it.
        facts: by the keys of `facts.facts_of`.
        fields: all others, by their names without the architecture.
    """

    architecture: str
    precision: str | None
    kind: str
    facts: dict[str, Any]
    fields: dict[str, Any]


def read_header(file: Path) -> Header:
    """Reads a file's header, without its weights.

    Raises:
        InputError: it is no GGUF file, or the package gguf is missing.
    """
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: each.contents() for name, each in reader.fields.items() if not _is_vocabulary(name)}
        tensors = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # numpy's errors, whatever the damage is
        raise InputError(f"{file} is no GGUF file, or a damaged one ({reason_of(error)})") from None
    architecture = str(fields.get("general.architecture"))
    values = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    number = values.get("general.file_type")
    kind = file_kinds().get(number, f"kind {number}")
    facts = {
        "layers": values.get("block_count"),
        "rope_theta": values.get("rope.freq_base"),
        "sliding_window": values.get("attention.sliding_window") or None,
        "sliding_layers": _pattern(values.get("attention.sliding_window_pattern")),
        "separate_head": "output.weight" in tensors,
    }
    facts = {name: value for name, value in facts.items() if value is not None}
    return Header(architecture, precision_of(kind), kind, facts, values)


def file_kinds() -> dict[Any, str]:
    """The kinds that GGUF files have, by the numbers in their headers: f32, bf16, q8_0, q4_k_m, ...

    Raises:
        InputError: the package gguf is missing.
    """
    kinds = import_gguf().LlamaFileType
    return {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for kind in kinds}


def import_gguf() -> Any:
    """The package that reads and writes GGUF files.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            "GGUF files need the package gguf, which is not installed", hint="pip install 'layerpeel[deploy]'"
        ) from None
    return gguf


def _is_vocabulary(name: str) -> bool:
    return name.startswith(("tokenizer.", "GGUF."))


def _pattern(value: Any) -> list[bool] | None:
    return [bool(each) for each in value] if isinstance(value, list) else None
