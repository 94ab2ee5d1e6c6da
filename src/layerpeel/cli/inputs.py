"""What the commands take: options that several share, and checks of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_teacher
from layerpeel.model.streaming import load_streamed
from layerpeel.run.preflight import check_output

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config; see configs/.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.field=value, over the config's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Layers = Annotated[str, typer.Option("--layers", help="Layers to remove, counted from 0: 5,7 or 5-8.")]
ScoreFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="A folder for scores and picture; OUTPUT-score if not given.")
]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Where to write the student.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that comes with the model run.")
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


def check_new_folder(folder: Path, model: str) -> None:
    """Checks that `--output` is a new or empty folder, where a student made from `model` can be written.

    Raises:
        InputError: it is not.
    """
    check_output(folder, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output: {folder} is not empty", hint="name a new or an empty folder")


def load_layerwise(settings: RunConfig) -> tuple[LayerwiseModel, PreTrainedTokenizerBase]:
    """Loads a config's teacher to be scored, with its layers in memory or read as they run (`score.weights`)."""
    if settings.score.weights == "stream":
        streamed, tokenizer = load_streamed(
            settings.teacher,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        return LayerwiseModel(streamed.model, streamed.weights_loaded), tokenizer
    model, tokenizer = load_teacher(settings)
    return LayerwiseModel(model), tokenizer
