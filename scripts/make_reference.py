"""Writes docs/reference/config.md and docs/reference/cli.md from the config's classes and the command line itself.

    python scripts/make_reference.py

The description of a field or an option is its docstring or help text in the source, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
import yaml
from pydantic import BaseModel

from layerpeel.cli.verbs import app
from layerpeel.config.distill import DistillConfig, LastPassConfig, LossConfig, RepairConfig
from layerpeel.config.fields import TeacherTextConfig, TextConfig
from layerpeel.config.presets import PRESETS
from layerpeel.config.run import RunConfig, StopConfig, TaskConfig
from layerpeel.config.score import HealConfig, ProtectConfig, RaceConfig, ScoreConfig, ShortlistConfig
from layerpeel.importance.metrics import METRICS
from layerpeel.losses.registry import LOSSES
from layerpeel.study.file import StudyConfig
from layerpeel.tasks.registry import TASKS

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"

# The sections of a config, by where they stand in it.
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("The run", RunConfig),
    ("stop", StopConfig),
    ("score", ScoreConfig),
    ("score.shortlist", ShortlistConfig),
    ("score.protect", ProtectConfig),
    ("score.race", RaceConfig),
    ("score.heal", HealConfig),
    ("tasks", TaskConfig),
    ("distill", DistillConfig),
    ("distill.text", TextConfig),
    ("distill.text from the teacher", TeacherTextConfig),
    ("distill.repair", RepairConfig),
    ("distill.last_pass", LastPassConfig),
    ("distill.losses", LossConfig),
]
WHERE = {model.__name__: name for name, model in SECTIONS}
PLAIN = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "none",
    "array": "list",
    "object": "mapping",
}
# What is written after an option, by the type of its value.
VALUES = {**dict.fromkeys([int, float, int | None, float | None], "NUMBER"), Path: "PATH", Path | None: "PATH"}
# What the text under a field refers to, and where that stands on the page.
LINKS = {f"table of {name}": f"[table of {name}](#{name})" for name in ("metrics", "losses", "presets")}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

CONFIG_HEAD = """# Config reference

Made by `python scripts/make_reference.py` from the classes that read a config; each description is the docstring of its
field. A config is YAML, and an unknown key is refused. `--set section.field=value` overrides a field on the command
line. Paths are taken from the config's folder first, then from the working folder, but `output` from the working folder
alone; `~` is the home folder. Counts such as `distill.tokens_per_round` understand `40k`, `2M`, `1.5B` and `1e6`, sizes
such as `score.memory` understand `8GB`. YAML reads `yes`, `no`, `on` and `off` as booleans: put them in quotes where
they are text.
"""
TASKS_HEAD = """## Kinds of tasks { #kinds-of-tasks }

The kind of a task decides which other keys it has, beside `kind` and `name`. How to choose:
[Choosing tasks](../tasks.md).
"""
METRICS_HEAD = """## Metrics { #metrics }

For `score.decide` and `score.shortlist.by`; low goes first.
"""
LOSSES_HEAD = """## Losses { #losses }

Keys of `distill.losses`; each has a `weight`, and these options.
"""
PRESETS_HEAD = """## Presets { #presets }

What `distill.preset` fills in, where a config does not give the field.
"""
STUDY_HEAD = "## A study's file { #study }\n\nWhat `layerpeel study` reads.\n"
CLI_HEAD = """# Command line reference

Made by `python scripts/make_reference.py` from the command line itself. Results go to stdout, progress and hints to
stderr. Exit codes are in [Questions and problems](../faq.md#exit-codes).
"""


def config_page() -> str:
    """Every section, then every kind of task, metric and loss, then a study's file."""
    parts = [CONFIG_HEAD]
    parts += [f"## {_heading(name)}\n\n{_summary(model)}\n\n{_fields(model)}" for name, model in SECTIONS]
    parts.append(TASKS_HEAD)
    parts += [f"### {name}\n\n{_summary(kind)}\n\n{_fields(kind, {'name', 'kind'})}" for name, kind in TASKS.items()]
    rows = [
        (f"`{name}`", ", ".join(sorted(metric.needs)), _summary(metric), _source(metric))
        for name, metric in METRICS.items()
    ]
    parts += [METRICS_HEAD, _table(("metric", "reads", "what it says", "in words, and its source"), rows), LOSSES_HEAD]
    parts += [f"### {name}\n\n{_summary(loss)} {_source(loss)}\n\n{_fields(loss)}" for name, loss in LOSSES.items()]
    parts += [PRESETS_HEAD, *(_preset(name, values) for name, values in PRESETS.items())]
    parts += [STUDY_HEAD, _fields(StudyConfig)]
    return "\n".join(parts)


def _preset(name: str, values: dict[str, Any]) -> str:
    """The fields of a preset, as they would be written in a config."""
    rows = [(f"`{field}`", f"`{_in_yaml(value)}`") for field, value in values.items()]
    return f"### {name}\n\n{_table(('field', 'value'), rows)}"


def _in_yaml(value: Any) -> str:
    """On one line, without the document's end that YAML puts after a number or word that stands alone."""
    return yaml.safe_dump([value], default_flow_style=True, width=1000, sort_keys=False).strip()[1:-1]


def cli_page() -> str:
    """Every verb, with its arguments and options, as its function declares them."""
    parts = [CLI_HEAD]
    for command in app.registered_commands:
        assert command.callback
        name = command.name or command.callback.__name__
        hints = get_type_hints(command.callback, include_extras=True)
        declared = [_declared(each, hints[each.name]) for each in signature(command.callback).parameters.values()]
        arguments = " ".join(written for written, _, _ in declared if not written.startswith("-"))
        parts.append(f"## {name}\n\n{_one_line(command.callback.__doc__ or '')}\n")
        parts.append(f"```text\n{f'layerpeel {name} {arguments}'.strip()} [OPTIONS]\n```\n")
        rows = [(f"`{written}`", default, text) for written, default, text in declared]
        parts.append(_table(("argument or option", "default", "what it is"), rows))
    return "\n".join(parts)


def _declared(parameter: Parameter, hint: Any) -> tuple[str, str, str]:
    """How an argument or option is written, its default, and its help text."""
    kind, info = get_args(hint)
    names = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    flag, word = kind is bool, info.metavar or VALUES.get(kind, "TEXT")
    if isinstance(info, typer.models.ArgumentInfo):
        written = info.metavar or parameter.name.upper()
    else:
        name = parameter.name.strip("_").replace("_", "-")
        written = ", ".join(names or ([f"--{name}", f"--no-{name}"] if flag else [f"--{name}"]))
        written += "" if flag else f" {word}"
    default = "needed" if parameter.default is Parameter.empty else _value(parameter.default)
    return written, "" if flag and names else default, _one_line(info.help or "")


def _heading(name: str) -> str:
    return f"{name} {{ #{_anchor(name)} }}"


def _anchor(name: str) -> str:
    return name.lower().replace(".", "-").replace(" ", "-")


def _summary(kind: type[Any]) -> str:
    return _one_line((kind.__doc__ or "").split("\n\n")[0])


def _source(kind: type[Any]) -> str:
    """The first line of its module, which cites where it is from."""
    return _one_line((__import__(kind.__module__, fromlist=["_"]).__doc__ or "").split("\n\n")[0])


def _fields(model: type[BaseModel], without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        if name not in without:
            default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
            description = _one_line(_said_of(name, model))
            written = field.alias or name
            rows.append((f"`{written}`", _type(schema["properties"][written], schema), default, description))
    return _table(("field", "type", "default", "what it is"), rows)


def _said_of(name: str, model: type[BaseModel]) -> str:
    """What stands under a field; a class that only changes its default leaves that to the one it is derived from."""
    texts = [kind.model_fields[name].description for kind in model.__mro__ if name in getattr(kind, "model_fields", {})]
    text = next(filter(None, texts), "")
    for words, link in LINKS.items():
        text = text.replace(words, link)
    return text


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, dict) and value:
        return ", ".join(f"`{key}`" for key in value)
    return _value(value)


def _value(value: Any) -> str:
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return "`[" + ", ".join(repr(each) if "\n" in str(each) else str(each) for each in value) + "]`"
    written = repr(value)[1:-1] if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{written}`" if written.strip() else "a space" if written else "–"


def _as_yaml(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        where = WHERE[name]
        return f"[{where}](#{_anchor(where)})"
    if "allOf" in field:
        return _type(field["allOf"][0], schema)
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in map(_as_yaml, field.get("enum", [field.get("const")])))
    if kinds := field.get("anyOf", field.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(each, schema) for each in kinds if each.get("type") != "null"))
    if field.get("type") == "array" and field.get("items"):
        return f"list of {_type(field['items'], schema)}"
    inner = field.get("additionalProperties")
    if isinstance(inner, dict) and "$ref" in inner:
        return f"mapping of names to {_type(inner, schema)}"
    bounds = [f"{sign} {field[key]}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([PLAIN.get(field.get("type", ""), "any"), *bounds])


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(_lines(heads, rows)) + "\n"


def _lines(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    (REFERENCE / "config.md").write_text(config_page(), encoding="utf-8")
    (REFERENCE / "cli.md").write_text(cli_page(), encoding="utf-8")
