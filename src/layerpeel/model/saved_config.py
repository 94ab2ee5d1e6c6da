"""The config.json of a student: its teacher's, as it was published, but for what has changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from layerpeel.errors import InputError, reason_of
from layerpeel.model.config_fields import rewrite_config, shortened_fields, text_config
from layerpeel.model.rotary_fields import old_rotary_fields

# Counters of modules that predict further tokens, whose tensors are no part of the model that transformers loads.
MTP_COUNTERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
# Fields that say nothing of what is computed, or are set for the files that are written.
NOT_COMPARED = {
    "dtype",
    "torch_dtype",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "quantization_config",
    *MTP_COUNTERS,
}


@dataclass(frozen=True)
class SavedConfig:
    """What goes into config.json.

    Attributes:
        fields: all of it.
        changed: by the field's name, what was and what is, of those that say how the model is built.
    """

    fields: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]


def write_fields(fields: dict[str, Any], folder: Path) -> None:
    """Writes a config.json."""
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def read_fields(folder: Path) -> dict[str, Any]:
    """A folder's config.json, as it is written.

    Raises:
        InputError: it cannot be read.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: cannot be read ({reason_of(error)})") from None
    assert isinstance(fields, dict)
    return fields


def student_config(
    published: dict[str, Any], config: PretrainedConfig, kept: Iterable[int], dtype: torch.dtype
) -> SavedConfig:
    """The config of a model without some of its layers.

    What the publisher wrote stays as it is, so that every program that read it reads ours; what the layers that are
    gone change is rewritten, and rotary parameters are said in the form of transformers 4, too. Where fields that are
    not known here would contradict what transformers makes of it, its own form of the config is taken instead.

    Args:
        published: the fields of the teacher's config.json.
        config: the teacher's, as transformers understands it; stays as it is.
        kept: indices of the layers that stay, ascending.
        dtype: of most of the student's tensors.
    """
    kept = list(kept)
    shorter = copy.deepcopy(config)
    changes = {}
    if len(kept) < text_config(config).num_hidden_layers:
        changes = shortened_fields(text_config(config), kept)
        rewrite_config(text_config(shorter), kept)
    fields = _rewritten(published, config, changes)
    if not _says(fields, shorter):
        fields = json.loads(json.dumps(shorter.to_diff_dict(), default=str))
    for place in _places(fields, config):
        place.update({name: 0 for name in MTP_COUNTERS if place.get(name)})
    fields.pop("quantization_config", None)
    fields = _with_dtype(fields, config, dtype)
    if hasattr(config, "tie_word_embeddings"):
        fields.setdefault("tie_word_embeddings", bool(config.tie_word_embeddings))
    fields = _with_both_forms(fields, shorter)
    return SavedConfig(fields, _changes(published, fields, config))


def _rewritten(published: dict[str, Any], config: PretrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    fields = copy.deepcopy(published)
    place, names = _text_place(fields, config), text_config(config).attribute_map
    if place is not None:
        place.update({names.get(name, name): value for name, value in changes.items()})
        for name, other in names.items():  # a field under both of its names
            if name in place and name != other and name in changes:
                place[name] = changes[name]
    return json.loads(json.dumps(fields, default=str))


def _text_place(fields: dict[str, Any], config: PretrainedConfig) -> dict[str, Any] | None:
    """Where in a config.json the language model is described."""
    text = text_config(config)
    if text is config:
        return fields
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            place = fields.setdefault(name, {})
            return place if isinstance(place, dict) else None
    return None


def _places(fields: dict[str, Any], config: PretrainedConfig) -> list[dict[str, Any]]:
    place = _text_place(fields, config)
    return [fields] if place is None or place is fields else [fields, place]


def _says(fields: dict[str, Any], expected: PretrainedConfig) -> bool:
    """Whether transformers makes of a config.json what is meant."""
    try:
        read = type(expected).from_dict(copy.deepcopy(fields))
        one, other = _comparable(read.to_dict()), _comparable(expected.to_dict())
    except Exception:  # whatever the family has against it
        return False
    return all(one.get(name) == value for name, value in other.items())


def _comparable(fields: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(fields, default=str))
    return {
        name: _comparable(value) if isinstance(value, dict) else value
        for name, value in plain.items()
        if name not in NOT_COMPARED and not (name == "type" and "rope_type" in plain)  # an older name of it
    }


def _with_dtype(fields: dict[str, Any], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    fields |= {"dtype": name, "torch_dtype": name}  # the second for transformers before 4.56
    for place in _places(fields, config)[1:]:  # of the text part, if it says so
        place.update({key: name for key in ("dtype", "torch_dtype") if key in place})
    return fields


def _with_both_forms(fields: dict[str, Any], expected: PretrainedConfig) -> dict[str, Any]:
    """Adds rotary parameters in the form that is missing, where both say the same."""
    text = text_config(expected)
    new = getattr(text, "rope_parameters", None)
    both, only_old = copy.deepcopy(fields), copy.deepcopy(fields)
    old = old_rotary_fields(text)
    place, bare = _text_place(both, expected), _text_place(only_old, expected)
    if not old or place is None or bare is None:
        return fields
    place["rope_parameters"] = copy.deepcopy(new)
    for name, value in old.items():
        if place.get(name) is None:
            place[name] = bare[name] = value
    bare.pop("rope_parameters", None)
    return both if _says(both, expected) and _says(only_old, expected) else fields


def _changes(published: dict[str, Any], fields: dict[str, Any], config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    changed = {}
    before, after = _places(copy.deepcopy(published), config)[-1], _places(fields, config)[-1]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            changed[name] = (before[name], after[name])
    return changed
