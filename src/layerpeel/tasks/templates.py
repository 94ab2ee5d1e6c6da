"""Templates over a row's columns."""

from __future__ import annotations

import re

from layerpeel.data.cells import TableRow, column_of, located, text_form
from layerpeel.errors import InputError

PLACEHOLDER = re.compile(r"\{(\w+)((?:\[\w+\])*)(\.\w[^{}]*)?\}")


def fill(template: str, row: TableRow, where: str) -> str:
    """Fills `{question}`, `{choices[0]}` or `{choices[text][0]}` with a row's columns; all other text stays as it is.

    Raises:
        InputError: a column or entry is absent, holds neither text nor a number, or the template reads an attribute.
    """
    place = located(row, where)

    def value(match: re.Match[str]) -> str:
        if match[3]:
            raise InputError(
                f"{place}: the template has '{match[0]}', but templates read columns and entries, not attributes",
                hint="as in {question} or {choices[0]}",
            )
        entry = column_of(row, match[1], where)
        for key in re.findall(r"\w+", match[2]):
            try:
                entry = entry[int(key) if isinstance(entry, (list, tuple)) else key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise InputError(
                    f"{place}: column '{match[1]}' has no '{key}'", hint=f"it holds {str(entry)[:80]!r}"
                ) from None
        text = text_form(entry)
        if text is None:
            raise InputError(
                f"{place}: '{match[0]}' is {str(entry)[:60]!r}, expected text or a number",
                hint="leave such rows out, or name an entry of it, as in {choices[0]}",
            )
        return text

    return PLACEHOLDER.sub(value, template)
