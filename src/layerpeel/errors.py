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


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line of its own length or less; its kind, if it says nothing."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:299] + "…") or type(error).__name__


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an "unknown ..." message: the nearest name, and those there are."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} available: {', '.join(options)}"


def resolve_class(name: str, table: dict[str, type[Any]], kind: str, base: type[Any] = object) -> type[Any]:
    """The class listed under `name`, or the one that a `module:Class` names: that module is imported, which runs it.

    Args:
        base: what the class has to be derived from.

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
    except (Exception, SystemExit) as error:  # the user's module runs, and raises what it likes
        raise InputError(
            f"{kind} '{name}' cannot be imported ({reason_of(error)})",
            hint="the module must be on the Python path, and import without an error",
        ) from None
    if not isinstance(found, type):
        raise InputError(f"{kind} '{name}' is no class", hint="name a class as module:Class")
    if not issubclass(found, base):
        raise InputError(
            f"{kind} '{name}' is not derived from {base.__name__}",
            hint=f"write class {attribute}({base.__name__}), from {base.__module__}",
        )
    return found
