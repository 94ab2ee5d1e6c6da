"""Templates over a row's columns."""

from __future__ import annotations

import re

from layerpeel.data.reading import column_of
from layerpeel.errors import InputError
from layerpeel.tasks.base import Row

PLACEHOLDER = re.compile(r"\{(\w+)((?:\[\w+\])*)(\.\w[^{}]*)?\}")


def fill(template: str, row: Row, where: str) -> str:
    """A template over a row's columns: `{question}`, `{choices[0]}`, `{choices[text][0]}`; all else stands for itself.

    Raises:
        InputError: a column is absent (those present are named), or an attribute is asked for.
    """

    def value(match: re.Match[str]) -> str:
        if match[3]:
            raise InputError(
                f"{where}: the template has '{match[0]}', but templates read columns and entries, not attributes",
                hint="as in {question} or {choices[0]}",
            )
        found = column_of(row, match[1], where)
        for key in re.findall(r"\w+", match[2]):
            try:
                found = found[int(key) if isinstance(found, (list, tuple)) else key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise InputError(
                    f"{where}: column '{match[1]}' has no '{key}'", hint=f"it holds {str(found)[:80]!r}"
                ) from None
        if found is None or isinstance(found, list | dict):
            raise InputError(
                f"{where}: '{match[0]}' is {str(found)[:60]!r}, expected text or a number",
                hint="leave such rows out, or name an entry of it, as in {choices[0]}",
            )
        return str(found)

    return PLACEHOLDER.sub(value, template)
