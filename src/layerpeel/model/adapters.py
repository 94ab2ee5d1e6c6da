"""Adapters (LoRA and the like) beside a model, or in its place: refused, or merged into its weights on request."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from layerpeel.errors import InputError, reason_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        path: the folder or hub name that holds it.
        base: folder or hub name of the model that it changes; the same as `path` if it lies beside its model.
        base_revision: of the base on the hub.
    """

    path: str
    base: str
    base_revision: str | None = None

    @property
    def is_alone(self) -> bool:
        return self.base != self.path


def find_adapter(path: str | Path, revision: str | None = None) -> Adapter | None:
    """Finds the adapter in a model's folder or hub repository; None if there is none.

    Raises:
        InputError: its config cannot be read, or names no base.
    """
    try:
        file = find_adapter_config_file(str(path), revision=revision)
    except (OSError, ValueError):  # no such model: who loads its config says so
        return None
    if file is None:
        return None
    if (Path(path) if Path(path).is_dir() else Path(file).parent).joinpath("config.json").is_file():
        return Adapter(str(path), str(path))
    try:
        fields = json.loads(Path(file).read_text(encoding="utf-8"))
        base = fields["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("no base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: an adapter, but not of which model ({reason_of(error)})",
            hint="set base_model_name_or_path in it to the model that it was trained on",
        ) from None
    return Adapter(str(path), base, fields.get("revision") or None)


def checked_adapter(path: str | Path, revision: str | None = None, *, merge: bool = False) -> Adapter | None:
    """The adapter that is to be merged; None if there is none.

    Args:
        merge: whether an adapter may be.

    Raises:
        InputError: there is one, and it may not be merged or cannot be; or none, and one should be.
    """
    adapter = find_adapter(path, revision)
    if adapter is None:
        if merge:
            raise InputError(
                f"merge_adapter: there is no adapter in {path} (adapter_config.json)", hint="set merge_adapter: false"
            )
        return None
    if not merge:
        where = f"an adapter of {adapter.base}" if adapter.is_alone else "a model with an adapter beside it"
        raise InputError(
            f"{path}: {where} (adapter_config.json), which is not merged into the weights",
            hint="set merge_adapter: true (or pass --merge-adapter) to merge it, or take adapter_config.json away to "
            "use the model without it",
        )
    if not find_spec("peft"):
        raise InputError("merge_adapter: peft is not installed", hint="pip install 'layerpeel[peft]'")
    return adapter


@contextmanager
def base_folder(adapter: Adapter) -> Iterator[str]:
    """Where the base's files are without the adapter, which transformers would otherwise load with them."""
    if adapter.is_alone or not Path(adapter.path).is_dir():
        yield adapter.base
        return
    with tempfile.TemporaryDirectory() as name:
        for file in Path(adapter.path).resolve().iterdir():
            if file.name not in ADAPTER_FILES:
                (Path(name) / file.name).symlink_to(file)
        yield name


def merge_adapter(model: PreTrainedModel, adapter: Adapter, revision: str | None = None) -> PreTrainedModel:
    """Merges an adapter into the weights of its base, with peft; gives the base.

    Raises:
        InputError: it does not fit, or is of a kind that cannot be merged.
    """
    from peft import PeftConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # between the versions of peft and transformers
            config = PeftConfig.from_pretrained(adapter.path, revision=revision)
            wrapped = get_peft_model(model, config)
            result = wrapped.load_adapter(adapter.path, "default", revision=revision)
            odd = sorted([*result.unexpected_keys, *result.missing_keys])
            if odd:
                raise ValueError(f"tensors without their place in the other: {', '.join(odd[:3])}")
            merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft and torch raise many types
        raise InputError(
            f"{adapter.path}: the adapter cannot be merged into {adapter.base} ({reason_of(error)})",
            hint="check that adapter and base belong together; prompts and other parts that are no change of a weight "
            "cannot be merged",
        ) from None
    return merged.requires_grad_(True)
