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


ROUND_TRIP = (
    "The column *files* says what becomes of a published checkpoint: in bfloat16 with float32 parts, with a "
    "generation_config.json and other files beside it. *As published*: every tensor that is left keeps its bytes and "
    "its dtype, through `remove`, a run, its resumption and an export; the config's fields stay, and rotary parameters "
    "are said in the form that programs before transformers 5 read, too. The tests hold the column to the truth."
)
# Families whose rotary parameters the form before transformers 5 cannot say: each type of layers has its own.
ONLY_NEW_ROTARY = ("gemma4_text", "gemma4_unified_text", "laguna", "lfm3", "mellum", "mimo_v2_flash")
AS_PUBLISHED, NEW_ROTARY_NOTE = "as published", "as published; only transformers 5 reads its rotary parameters"


@dataclass(frozen=True)
class FamilyStatus:
    """One row of the table.

    Attributes:
        family: its `model_type`.
        layers: name of the list of layers, relative to the base model; empty if refused.
        status: `tested`, or `refused`.
        files: what becomes of a published checkpoint; empty if refused.
        note: which layers cannot be removed or what is not exact, or why the family is refused.
    """

    family: str
    layers: str
    status: str
    files: str
    note: str


def family_statuses() -> list[FamilyStatus]:
    """Families that are tested, then those that are refused."""
    tested = [
        FamilyStatus(name, row.layers, "tested", _files(name), row.note) for name, row in sorted(FAMILIES.items())
    ]
    return tested + [FamilyStatus(name, "", "refused", "", reason) for name, reason in sorted(REFUSED.items())]


def _files(family: str) -> str:
    return NEW_ROTARY_NOTE if family in ONLY_NEW_ROTARY else AS_PUBLISHED


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
        ROUND_TRIP,
        "",
        "| family | layers | status | files | note |",
        "|---|---|---|---|---|",
        *(_row(status) for status in family_statuses()),
    ]
    return "\n".join(lines) + "\n"


def _row(status: FamilyStatus) -> str:
    layers = status.layers and f"`{status.layers}`"
    return f"| {status.family} | {layers} | {status.status} | {status.files} | {status.note} |"
