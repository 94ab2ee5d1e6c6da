"""The table of families for people and machines: `layerpeel families`, its JSON, and the page docs/families.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from layerpeel.model.families import FAMILIES, REFUSED

TESTED = (
    "Every family in this table that is not refused has a tiny random model in the tests. Removed are the first layer "
    "that may go, a middle one, the last, and three: the model in memory is the one that plain transformers loads, "
    "generating with and without a cache gives the same, scores from one pass are those of removing and running, and "
    "two steps of distillation run."
)
OTHERS = (
    "A family without a row works if its layers and its final norm can be found without doubt, under the same checks. "
    "Of any family, a layer stays whose loss a config cannot express, such as the last of a kind of attention; a run "
    "says so, and why. Models that read images or sound are refused unless AutoModelForCausalLM loads them."
)


@dataclass(frozen=True)
class FamilyStatus:
    """One row of the table.

    Attributes:
        family: its `model_type`.
        layers: name of the list of layers, relative to the base model; empty if refused.
        status: `tested`, or `refused`.
        note: which layers cannot be removed or what is not exact, or why the family is refused.
    """

    family: str
    layers: str
    status: str
    note: str


def family_statuses() -> list[FamilyStatus]:
    """Families that are tested, then those that are refused."""
    tested = [FamilyStatus(name, row.layers, "tested", row.note) for name, row in sorted(FAMILIES.items())]
    return tested + [FamilyStatus(name, "", "refused", reason) for name, reason in sorted(REFUSED.items())]


def families_json() -> list[dict[str, str]]:
    """The table for machines."""
    return [asdict(status) for status in family_statuses()]


def families_markdown() -> str:
    """The page docs/families.md."""
    lines = [
        "# Model families",
        "",
        "Made by `layerpeel families --markdown > docs/families.md`.",
        "",
        TESTED,
        "",
        OTHERS,
        "",
        "| family | layers | status | note |",
        "|---|---|---|---|",
        *(f"| {s.family} | {s.layers and f'`{s.layers}`'} | {s.status} | {s.note} |" for s in family_statuses()),
    ]
    return "\n".join(lines) + "\n"
