"""What the commands take: options that several share, and checks of their values."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer
from pydantic import Field, TypeAdapter, ValidationError

from layerpeel.config.fields import AS_BYTES
from layerpeel.errors import InputError
from layerpeel.storage.outputs import check_output, check_space, is_empty

if TYPE_CHECKING:
    from layerpeel.model.loading import TeacherOptions


def positive(value: float | None) -> float | None:
    """Refuses numbers that are not above 0, and not finite."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"expected a finite number above 0, found {value}")
    return value


def expand_home(text: str) -> Path:
    """A path with a leading `~` expanded, which not every shell does (as in `--output=~/x`).

    Raises:
        InputError: there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"--output {text}: {error}", hint="write the path in full") from None


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config; see configs/.")]
ConfigOutput = Annotated[
    Path, typer.Option("--output", "-o", parser=expand_home, metavar="FILE", help="Where to write the config.")
]
Overrides = Annotated[list[str], typer.Option("--set", help="section.field=value, over the config's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Layers = Annotated[str, typer.Option("--layers", help="Layers to remove, counted from 0: 5,7 or 5-8.")]
ScoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=expand_home,
        metavar="PATH",
        help="A folder for scores and picture; OUTPUT-score if not given.",
    ),
]
Folder = Annotated[
    Path, typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="Where to write the student.")
]
Teacher = Annotated[
    list[str], typer.Option("--set", help="teacher=PATH: where the teacher is now, if it has been moved.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that comes with the model run.")
]

Revision = Annotated[str | None, typer.Option("--revision", help="Of a model on the hub: a branch, tag or commit.")]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="Merge the adapter (LoRA) in the model's folder into it, by peft.")
]


def parse_layers(text: str) -> list[int]:
    """The layer indices that `--layers` lists, such as 5,7 or 5-8.

    Raises:
        InputError: it is not such a list, or repeats a layer.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"--layers {text}: expected layer numbers", hint="as in --layers 5,7 or --layers 5-8")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    repeated = [layer for layer in layers if layers.count(layer) > 1]
    if repeated:
        raise InputError(f"--layers {text}: layer {repeated[0]} is named twice", hint="name each layer once")
    return layers


def parse_size(option: str, text: str) -> int:
    """The bytes that an option names, such as 24GB.

    Raises:
        InputError: it is no such size.
    """
    try:
        return TypeAdapter(Annotated[int, Field(ge=1), AS_BYTES]).validate_python(text)
    except ValidationError:
        raise InputError(f"{option} {text}: expected a size", hint=f"as in {option} 24GB") from None


def check_new_folder(folder: Path, model: str) -> None:
    """Checks that `--output` is a new or empty folder, where a student made from `model` can be written.

    Raises:
        InputError: it is not.
    """
    check_output(folder, model)
    if folder.exists() and not is_empty(folder):
        raise InputError(f"--output: {folder} is not empty", hint="name a new or an empty folder")


def check_room(folder: Path, model: str, removed: int, **options: Unpack[TeacherOptions]) -> None:
    """Checks that the disk has room for a model without so many of its layers, as far as that can be told.

    Raises:
        InputError: it has not.
    """
    from layerpeel.model.config_fields import text_config
    from layerpeel.model.loading import load_config_of

    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if os.path.isdir(model) else 0
    depth = text_config(load_config_of(model, **options)).num_hidden_layers if size else 0
    if depth:  # of embeddings and head nothing goes, so this is too little
        check_space(folder, size * max(depth - removed, 0) // depth, "the student")


def check_score_folder(folder: Path, model: str) -> None:
    """Checks that scores can be written into a folder, which may hold older ones.

    Raises:
        InputError: they cannot.
    """
    check_output(folder, model)
    for name in ("scores.json", "importance.png"):
        if (folder / name).is_dir():
            raise InputError(f"output: {folder / name} is a folder, where a file has to be", hint="move it away")


def find_model(model: str) -> str:
    """A model that a command names: a folder from the working folder, made absolute; else as it is, a hub name."""
    path = os.path.abspath(os.path.expanduser(model))
    return path if os.path.isdir(path) else model
