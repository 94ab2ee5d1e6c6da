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
    """Spares the collection of garbage what large libraries make: many objects that live as long as the process.

    They come in sooner, and the process ends sooner, for they are not searched then either.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
