"""Errors that are shown as a message and a hint, without a traceback; and lookups that raise them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class LayerpeelError(Exception):
    """An error whose message says what is wrong, where, and what was expected.

    Attributes:
        hint: what the user can do about it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(LayerpeelError, ValueError):
    """Invalid input: a config, a file, a model, an option or the environment (exit code 2)."""


class RunError(LayerpeelError, RuntimeError):
    """A run that cannot continue, though its input was valid (exit code 1)."""


def reason_of(error: BaseException) -> str:
    """The message of a library's exception on one line, cut to 300 characters; its class name if it has none."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:299] + "…") or type(error).__name__


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an "unknown ..." message: the closest option, and all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} available: {', '.join(options)}"


def resolve_class(name: str, table: dict[str, type[Any]], kind: str, base: type[Any] = object) -> type[Any]:
    """Resolves the name of a class in a config; `module:Class` imports the module, and so runs its code.

    Args:
        name: a key of `table`, or `module:Class`.
        table: the package's classes by name.
        kind: what the class is, for messages: metric, loss or task.
        base: the class it has to be derived from.

    Raises:
        InputError: `name` is neither, cannot be imported, or is no class derived from `base`.
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
        resolved = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise InputError(
            f"{kind} '{name}' cannot be imported ({reason_of(error)})",
            hint="the module must be on the Python path, and import without an error",
        ) from None
    if not isinstance(resolved, type):
        raise InputError(f"{kind} '{name}' is no class", hint="name a class as module:Class")
    if not issubclass(resolved, base):
        raise InputError(
            f"{kind} '{name}' is not derived from {base.__name__}",
            hint=f"write class {attribute}({base.__name__}), from {base.__module__}",
        )
    return resolved
