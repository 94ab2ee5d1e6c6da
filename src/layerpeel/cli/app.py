"""The command line: its app, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layerpeel.processes.distributed import RANK

app = typer.Typer(
    help="Makes language models shallower while keeping their quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output = Console(
    highlight=False, width=max(140, Console().width), quiet=RANK > 0
)  # a table too wide may wrap, and keeps its numbers


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config; see configs/.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.field=value, over the config's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Layers = Annotated[str, typer.Option("--layers", help="Layers to remove, counted from 0: 5,7 or 5-8.")]
ScoreFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="A folder for scores and picture; OUTPUT-score if not given.")
]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Where to write the student.")]
