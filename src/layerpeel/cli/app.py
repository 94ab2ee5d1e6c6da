"""The command line's Typer app, to which `verbs` adds its commands."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Makes language models shallower while keeping their quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
