"""The base class of config sections, text sources, and numbers with units."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from layerpeel.config.yaml_values import abbreviated

NUMBER = r"[0-9]{1,18}(?:\.[0-9]{0,18})?"
EXACT = {"k": Decimal(10**3), "m": Decimal(10**6), "b": Decimal(10**9)}


def _parse_count(value: Any) -> Any:
    """Converts 2.5B, 300M, 40k, 1e6 to integers; leaves other values to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value} (YAML reads yes, no, on and off as booleans)")
    match = (
        re.fullmatch(rf"\s*({NUMBER})\s*([kKmMbB]|[eE]\+?[0-9]{{1,2}})\s*", value) if isinstance(value, str) else None
    )
    if not match:
        return value
    count = Decimal(match[1]) * (EXACT.get(match[2].lower()) or Decimal(f"1{match[2]}"))
    if count != count.to_integral_value():
        raise ValueError(f"expected a whole number, found {value}")
    return int(count)


def _parse_bytes(value: Any) -> Any:
    """Converts 8GB, 500 MB (powers of 1024) to bytes; leaves other values to pydantic."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*([KMGT]?)i?B\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    return int(Decimal(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " "))) if match else value


def _count_or_auto(value: Any) -> Any:
    """As `_parse_count`, for a field that takes auto, too: one message instead of pydantic's two."""
    value = _parse_count(value)
    if (isinstance(value, str) and value.strip().isdecimal()) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"expected auto, or a whole number of at least 1, found {abbreviated(value)}")
    return value


def _expand_home(path: Path) -> Path:
    """Replaces a leading `~`.

    Raises:
        ValueError: there is no such home.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


AS_COUNT = BeforeValidator(_parse_count)
"""Of a field for a number of tokens, rows, steps or the like; 2M, 40k, 1.5B and 1e6 are understood."""
AS_BYTES = BeforeValidator(_parse_bytes)
"""Of a field for a number of bytes; 8GB is understood."""
AutoCount = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_count_or_auto)]
"""A count of at least 1, or auto."""
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Of a source of text."""
Folder = Annotated[Path, AfterValidator(_expand_home)]
"""A folder, with ~ expanded."""


class Section(BaseModel):
    """A section of the config; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TextConfig(Section):
    """Where text comes from: a file, a folder, a dataset."""

    path: Annotated[str, Field(min_length=1)]
    """A .txt, .jsonl (.ndjson, .jsonlines), .json, .csv, .tsv, .parquet or .arrow file (or a .gz of one), a folder of
    such, a saved dataset, a glob, or a hub name; a hub dataset is read over the network as far as it is needed."""
    column: str = "text"
    """The column that holds the text, where there are columns."""
    messages: str | None = None
    """The column that holds chats, lists of {"role", "content"} or {"from", "value"} (ShareGPT), to be written by the
    tokenizer's chat template. A column `messages` or `conversations` is found by itself where there is no column
    `text`."""
    split: str = "train"
    """The split, where there are splits."""
    name: str | None = None
    """The subset of a hub dataset."""
    weight: Weight = 1.0
    """How often the next document is from this source, against the weights of the others. A source that ends is drawn
    from no more: the others go on, by their weights, until all have ended. Then the text begins again."""
    shuffle: Annotated[int, Field(ge=0), AS_COUNT] = 2048
    """Documents that are held in memory, of which the next is drawn at random, so that a sorted file gives no one-sided
    beginning; 0: in order. Lower it where documents are books."""
    hold_out: Annotated[int, Field(ge=2), AS_COUNT] | None = None
    """Leave out the first of every so many documents; `layerpeel init` writes those to a file for a task."""


def _as_source(value: Any) -> Any:
    """Makes a mapping from a path; leaves other values to pydantic."""
    return {"path": value} if isinstance(value, str) else value


class TeacherTextConfig(Section):
    """Text that the teacher writes: sampled once, before it is first needed, and kept beside the run."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    from_: Annotated[Literal["teacher"], Field(alias="from")] = "teacher"
    """Says that it is this kind of source; there is no other yet."""
    tokens: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """How many to sample. If not given, as many as the trainings read of this source, by its weight and the length of
    the others' documents, so that none comes twice (one round's, without `stop.target_layers` or with `fresh_text:
    false`), or as a repair or the scores read, if that is more; but 50M at most."""
    prompts: Annotated[TextConfig | None, BeforeValidator(_as_source)] = None
    """What its documents begin with: a path, or a source of texts or chats; a chat goes on with what the assistant says
    next, in the tokenizer's chat template. If there are more documents than prompts, these come again. If not given,
    documents begin with the beginning-of-text token; where the tokenizer has none, with the first 8 tokens of
    documents of the other sources beside it, or else with the end-of-text token."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Divides the logits: below 1 the text is more probable, and less diverse."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1: draw only from the most probable tokens that have this share of the probability (nucleus sampling)."""
    weight: Weight = 1.0
    """As that of any other source."""


SOURCES = {kind.__name__: kind for kind in (TextConfig, TeacherTextConfig)}
"""The kinds of sources of text, by the names that pydantic's errors have for them."""


def _kind_of_source(value: Any) -> str:
    says_so = isinstance(value, dict) and ("from" in value or "from_" in value)
    return (TeacherTextConfig if says_so or isinstance(value, TeacherTextConfig) else TextConfig).__name__


def _as_list(value: Any) -> Any:
    """Makes a list of mappings from one source or several, each a mapping or a path."""
    values = [value] if isinstance(value, (str, dict)) else value
    return [_as_source(item) for item in values] if isinstance(values, list) else value


TextSource = TextConfig | TeacherTextConfig


def file_of(source: TextSource) -> TextConfig | None:
    """What a source reads from a file: itself, or the prompts of one that the teacher writes, if it has any."""
    return source if isinstance(source, TextConfig) else source.prompts


Texts = Annotated[
    list[
        Annotated[
            Annotated[TextConfig, Tag("TextConfig")] | Annotated[TeacherTextConfig, Tag("TeacherTextConfig")],
            Discriminator(_kind_of_source),
        ]
    ],
    BeforeValidator(_as_list),
]
