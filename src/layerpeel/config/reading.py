"""Reads configs: YAML files and --set, relative paths, and error messages that name the field."""

from __future__ import annotations

import glob
import os.path
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from layerpeel.config.fields import SOURCES
from layerpeel.config.run import RunConfig
from layerpeel.config.yaml_values import abbreviated, read_yaml
from layerpeel.errors import InputError, nearest

QUOTES = {
    bool: "YAML reads yes, no, on, off, true and false as booleans: put them in quotes",
    int: "put a number that is text in quotes",
    float: "put a number that is text in quotes",
}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a config from YAML.

    Args:
        path: the file. Paths in it are taken from its folder first, then from the working folder.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        InputError: the file cannot be read, or a field is invalid.
    """
    path = Path(path)
    raw = read_file(path, "config", "configs")
    for text in overrides:
        override(raw, text)
    return resolve_paths(parse_config(raw, str(path)), path.parent)


def read_file(path: Path, kind: str, examples: str) -> dict[str, Any]:
    """Reads the top-level mapping of a YAML file.

    Args:
        kind: what the file is, for messages: config or study.
        examples: a folder of examples, for hints.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    hint = f"see {examples}/ for examples"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no such {kind}: {path}", hint=f"give the path of a YAML file; {hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})", hint=hint) from None
    raw = read_yaml(text, f"{path}: cannot be read as YAML", hint)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping of fields to values", hint=hint)
    return raw


def parse_config(raw: dict[str, Any], where: str) -> RunConfig:
    """Validates the fields of a config.

    Args:
        where: the file, for messages.

    Raises:
        InputError: a field is invalid; the message names it.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {describe(error, RunConfig)}", hint="see configs/ for examples") from None


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first of pydantic's errors, unknown keys last, as a message that names the field.

    Args:
        prefix: the section of the config that the model's fields are in; empty for the config itself.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    field = ".".join(filter(None, [prefix, *(str(part) for part in first["loc"] if part not in SOURCES)]))
    if first["type"] == "extra_forbidden":
        section = _section(model, first["loc"][:-1])
        return f"{field}: unknown key{nearest(str(first['loc'][-1]), section.model_fields)}"
    if first["loc"][-2:] == ("TextConfig", "path") and first["type"] == "missing":
        return f"{field}: expected a path, or `from: teacher`; found neither"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("missing", "value_error") else f", found {abbreviated(first['input'])}"
    values = first["input"] if isinstance(first["input"], list) else [first["input"]]
    quotes = [QUOTES[type(value)] for value in values if type(value) in QUOTES]
    note = f" ({quotes[0]})" if quotes and first["type"] in ("string_type", "literal_error") else ""
    return f"{field}: {message[:1].lower()}{message[1:]}{value}{note}".removeprefix(": ")


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Replaces, in place, each path of a config that exists relative to `folder` or the working folder."""
    config.teacher = _resolve(config.teacher, folder)
    for text in config.files_of_text().values():
        text.path = _resolve(text.path, folder)
    for task in config.tasks:
        extra = task.model_extra or {}
        for key in task.paths:
            extra[key] = _resolve(extra[key], folder)
    return config


def _resolve(path: str, folder: Path) -> str:
    """The absolute path that a path leads to from `folder`, or else from the working folder; as it is, if to none.

    Only the path itself may be a glob: brackets in the name of a folder that it is taken from are no pattern.
    """
    for base in (folder, Path()):
        with suppress(OSError, ValueError, RuntimeError):  # not a valid file name; reported where it is opened
            written, start = Path(path).expanduser(), os.path.abspath(base)
            if os.path.exists(candidate := os.path.join(start, written)):
                return os.path.normpath(candidate)
            pattern = os.path.normpath(os.path.join(glob.escape(start), written))
            if glob.has_magic(path) and glob.glob(pattern):
                return pattern
    return path


def override(raw: dict[str, Any], text: str) -> None:
    """Sets `section.field=value`, the value in YAML, in an unvalidated config.

    Raises:
        InputError: the text has another form, or a section that it names is not a mapping.
    """
    key, value = read_override(text)
    *sections, field = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise InputError(f"--set {text}: {section} is not a section", hint="see configs/ for examples")
    raw[field] = value


def read_override(text: str) -> tuple[str, Any]:
    """The field and the value of `section.field=value`, the value in YAML.

    Raises:
        InputError: the text has another form.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.strip().split(".")):
        raise InputError(f"--set {text}: expected section.field=value", hint="as in --set stop.target_layers=24")
    hint = "quote it, as in --set 'a.b=\"x: y\"'"
    return key.strip(), read_yaml(value, f"--set {text}: the value is not YAML", hint)


def _section(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    """The section of the config that a pydantic error location is in."""
    for part in location:
        model = SOURCES.get(part, model)
        field = model.model_fields.get(str(part))
        sections = sections_in(field.annotation) if field else []
        model = sections[0] if sections else model
    return model


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a field's type annotation, at any depth of lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in sections_in(argument)]
