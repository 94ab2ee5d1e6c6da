"""Reads configs: YAML files and --set, relative paths, and error messages that name the field."""

from __future__ import annotations

import glob
import os.path
import reprlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, nearest, reason_of

MAX_VALUES = 100_000  # in a config, aliases expanded


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


class _Loader(yaml.SafeLoader):
    """Loads plain values only, and refuses duplicate keys, of which YAML would silently drop one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.MarkedYAMLError("while reading a mapping", node.start_mark, f"found the key '{twice[0]}' twice")
        return super().construct_mapping(node, deep)


def read_yaml(text: str, wrong: str, hint: str) -> Any:
    """Parses a YAML text of plain values.

    Args:
        wrong: beginning of the message of an error; the reason follows in brackets.
        hint: of an error.

    Raises:
        InputError: it is not YAML, or has tags, duplicate keys, an integer of over 64 bits, or more than `MAX_VALUES`
            values.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        _check_extent(value)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{wrong} ({reason_of(error)})", hint=hint) from None
    finally:
        loader.dispose()
    return value


def _check_extent(value: Any) -> None:
    """Checks the size of a nested value.

    Raises:
        ValueError: it holds more than `MAX_VALUES` values, or an integer of over 64 bits.
    """
    count, stack = 0, [value]
    while stack:
        count, item = count + 1, stack.pop()
        if count > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(item, int) and abs(item) >= 2**63:
            raise ValueError(f"the number {_short(item)} is too large")
        stack += [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []


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


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors, unknown keys last, as a message that names the field."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = _section(model, first["loc"][:-1])
        return f"{field}: unknown key{nearest(str(first['loc'][-1]), section.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("missing", "value_error") else f", found {_short(first['input'])}"
    return f"{field}: {message[:1].lower()}{message[1:]}{value}".removeprefix(": ")


def _short(value: Any) -> str:
    """The repr of a value, abbreviated if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return f"a very long {type(value).__name__}"


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Replaces, in place, each path of a config that exists relative to `folder` or the working folder."""
    config.teacher = _resolve(config.teacher, folder)
    for text in [*config.distill.text, *(config.score.text or [])]:
        text.path = _resolve(text.path, folder)
    for task in config.tasks:
        extra = task.model_extra or {}
        for key in ("data", "fewshot_data", "include_path", *(["task"] if task.kind == "harness" else [])):
            if isinstance(extra.get(key), str):
                extra[key] = _resolve(extra[key], folder)
    return config


def _resolve(path: str, folder: Path) -> str:
    for base in (folder, Path()):
        with suppress(OSError, ValueError, RuntimeError):  # not a valid file name; reported where it is opened
            candidate = (base / Path(path).expanduser()).absolute()
            if candidate.exists() or (glob.has_magic(path) and glob.glob(str(candidate))):
                return os.path.normpath(candidate)
    return path


def override(raw: dict[str, Any], text: str) -> None:
    """Sets `section.field=value`, the value in YAML, in an unvalidated config.

    Raises:
        InputError: the text has another form, or a section that it names is not a mapping.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.strip().split(".")):
        raise InputError(f"--set {text}: expected section.field=value", hint="as in --set stop.target_layers=24")
    *sections, field = key.strip().split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise InputError(f"--set {text}: {section} is not a section", hint="see configs/ for examples")
    raw[field] = read_yaml(value, f"--set {text}: the value is not YAML", "quote it, as in --set 'a.b=\"x: y\"'")


def _section(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    """The section of the config that a pydantic error location is in."""
    for part in location:
        field = model.model_fields.get(str(part))
        sections = sections_in(field.annotation) if field else []
        model = sections[0] if sections else model
    return model


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a field's type annotation, at any depth of lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in sections_in(argument)]
