"""Lines of text files, and the rows of .txt and JSON-lines files."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from layerpeel.data.cells import PlacedRow, TableRow, WrittenFloat
from layerpeel.errors import InputError

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character; JSON may hold one without the other


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file, packed as .gz or not, each ended by \n whatever ends it there (\n, \r\n or \r).

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    position = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for raw in file:
                if not position:
                    _check_encoding(raw, path)
                text = raw.decode("utf-8" if position else "utf-8-sig")
                if "\r" in text:
                    yield from _universal(text)
                else:
                    yield text
                position += len(raw)
    except UnicodeDecodeError as error:
        mark = 3 * (not position and raw.startswith(b"\xef\xbb\xbf"))  # its positions begin after the mark
        raise InputError(
            f"{path}: not UTF-8 (byte {position + mark + error.start})", hint="save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})", hint="is it whole, and may you read it?") from None


def read_documents_of(path: Path) -> Iterator[TableRow]:
    """The documents of a .txt file, in the column `text`; a line with only the separator ends one."""
    lines: list[str] = []
    first = 1
    for number, line in enumerate(chain(read_lines(path), [SEPARATOR]), start=1):
        if line.strip() != SEPARATOR:
            lines.append(line)
            continue
        document = "".join(lines).strip("\n")
        if document.strip():
            yield PlacedRow({"text": document}, str(path), f"line {first}")
        lines, first = [], number + 1


def read_json_lines(path: Path) -> Iterator[TableRow]:
    """The rows of a file with one JSON object a line; empty lines are left out.

    Raises:
        InputError: a line is no JSON object.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}", "expected one JSON object a line")
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}",
                hint='a line looks like {"text": "..."}',
            )
        yield PlacedRow(row, str(path), f"line {number}")


def parse_json(text: str, where: str, hint: str) -> Any:
    """The value of a JSON text; numbers with a point or an exponent are `WrittenFloat`.

    Raises:
        InputError: it is not JSON, names a key twice in one object, or holds half a character.
    """
    try:
        value = _DECODER.decode(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half a character, which no text can hold ({error.reason})",
            hint="write it without \\ud800 and the like, or with both halves",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})", hint=hint) from None
    return value


def _check_encoding(beginning: bytes, path: Path) -> None:
    if beginning.startswith(b"\x1f\x8b") and path.suffix.lower() != ".gz":
        raise InputError(f"{path}: packed by gzip", hint=f"call it {path.name}.gz, or unpack it")
    marked = beginning.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"))
    zeros = [byte == 0 for byte in beginning[:4]]  # of UTF-16 without a mark, every other byte is 0
    if marked or zeros in ([True, False, True, False], [False, True, False, True]):
        raise InputError(f"{path}: UTF-16 or UTF-32, expected UTF-8", hint="save the file as UTF-8")


def _universal(text: str) -> Iterator[str]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    yield from (f"{line}\n" for line in lines[:-1])
    if lines[-1]:
        yield lines[-1]


def _integer(written: str) -> int | WrittenFloat:
    return WrittenFloat(written) if written == "-0" else int(written)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key '{next(key for key in keys if keys.count(key) > 1)}' twice")
    return columns


_DECODER = json.JSONDecoder(
    parse_float=WrittenFloat, parse_constant=WrittenFloat, parse_int=_integer, object_pairs_hook=_object
)
