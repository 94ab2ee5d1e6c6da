"""Plain values from YAML; what YAML 1.1 reads as something else than was written is read as written, or refused."""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

from layerpeel.errors import InputError, reason_of

MAX_VALUES = 100_000  # in a text, aliases expanded
OTHER_BASE = re.compile(
    r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
)  # octal or to the base of 60, in YAML 1.1
EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")  # a number to everybody but YAML 1.1, which wants a dot
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Loads plain values only, and refuses duplicate keys, of which YAML would silently drop one.

    Dates stay text, `1e-4` is a number, and what YAML reads to another base than ten (`010`, `1:30`) is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.MarkedYAMLError("while reading a mapping", node.start_mark, f"found the key '{twice[0]}' twice")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Of a key that is merged and written, what is written counts, also where that is merged once more."""
        super().flatten_mapping(node)
        pairs = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}
        node.value = list(pairs.values())

    def construct_decimal(self, node: yaml.ScalarNode) -> Any:
        if OTHER_BASE.fullmatch(node.value):
            base = "to the base of 60" if ":" in node.value else "as an octal number"
            raise yaml.MarkedYAMLError(
                "while reading a number",
                node.start_mark,
                f"YAML reads {node.value} {base}: put it in quotes if it is text, or write the number that you mean",
            )
        if re.fullmatch(EXPONENT, node.value):
            return float(node.value)
        return super().construct_yaml_int(node) if node.tag.endswith(":int") else super().construct_yaml_float(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{EXPONENT.pattern}$"), list("-+0123456789"))
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)


def read_yaml(text: str, wrong: str, hint: str) -> Any:
    """Parses a YAML text of plain values.

    Args:
        wrong: beginning of the message of an error; the reason follows in brackets.
        hint: of an error.

    Raises:
        InputError: it is not YAML, or has tags, duplicate keys, an integer of over 64 bits, or more than `MAX_VALUES`
            values.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        _check_extent(value)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = reason_of(error)
        if "escape" in reason:
            hint = "YAML reads a backslash in double quotes as an escape: put Windows paths in single quotes, or use /"
        raise InputError(f"{wrong} ({reason})", hint=hint) from None
    finally:
        loader.dispose()
    return value


def abbreviated(value: Any) -> str:
    """The repr of a value, abbreviated if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return f"a very long {type(value).__name__}"


def _check_extent(value: Any) -> None:
    """Checks the size of a nested value.

    Raises:
        ValueError: it holds more than `MAX_VALUES` values, or an integer of over 64 bits.
    """
    count, stack = 0, [value]
    while stack:
        count, item = count + 1, stack.pop()
        if count > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(item, int) and abs(item) >= 2**63:
            raise ValueError(f"the number {abbreviated(item)} is too large")
        stack += [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []
