"""The command line's Typer app, to which `verbs` adds its commands, and how these import what they need."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import typer

app = typer.Typer(
    help="Makes language models shallower while keeping their quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def importing() -> Iterator[None]:
    """Puts off the collection of garbage: large libraries make many objects and no garbage, and come in sooner so."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
