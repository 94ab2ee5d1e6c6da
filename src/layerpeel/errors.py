"""What goes wrong by a user's doing, or in a run: said without a traceback."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class LayerpeelError(Exception):
    """An error to be shown as a message: what was wrong, where, what was expected; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(LayerpeelError, ValueError):
    """Bad input from a user."""


class RunError(LayerpeelError, RuntimeError):
    """A run that cannot go on."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an "unknown ..." message: the nearest name, and those there are."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} available: {', '.join(options)}"


def resolve_class(name: str, table: dict[str, type[Any]], kind: str) -> type[Any]:
    """The class listed under `name`, or the one that a `module:Class` names.

    Raises:
        InputError: there is none.
    """
    if name in table:
        return table[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise InputError(
            f"unknown {kind} '{name}'{nearest(name, table)}",
            hint="or name a class of your own as module:Class",
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{kind} '{name}' cannot be imported ({error})", hint="the module must be on the Python path"
        ) from None
    if not isinstance(found, type):
        raise InputError(f"{kind} '{name}' is no class", hint="name a class as module:Class")
    return found
