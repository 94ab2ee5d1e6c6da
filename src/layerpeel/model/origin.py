"""The teacher's checkpoint as the origin of a student: its files, and the dtype that each tensor has in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from layerpeel.errors import InputError, reason_of
from layerpeel.model.adapters import checked_adapter
from layerpeel.model.architecture import Architecture, find_architecture
from layerpeel.model.checkpoint import stored_dtype
from layerpeel.model.layer_names import LayerNames, find_layer_names
from layerpeel.model.saved_config import read_fields
from layerpeel.model.side_files import CARRIED, CARRIED_FOLDERS, in_any_case
from layerpeel.model.tensor_files import FLOATS, StoredTensor, main_dtype, stored_tensors

if TYPE_CHECKING:
    from layerpeel.config.run import RunConfig

# What is read of a model on the hub.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md", "*.py"]


@dataclass(frozen=True)
class Origin:
    """A teacher's checkpoint, and which of its layers a student still has.

    Attributes:
        folder: with its files.
        kept: indices of the layers that are left, ascending; all of them, if None.
        code: whether its own code may run.
        merges_adapter: whether an adapter that lies beside these files is merged into the model.
    """

    folder: Path
    kept: tuple[int, ...] | None = None
    code: bool = False
    merges_adapter: bool = False

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Of the files; none if they are quantised, which no student is."""
        return {} if self.is_quantised else stored_tensors(self.folder)

    @cached_property
    def fields(self) -> dict[str, Any]:
        return read_fields(self.folder)

    @property
    def is_quantised(self) -> bool:
        places = [self.fields, self.fields.get("text_config")]
        return any(isinstance(place, dict) and place.get("quantization_config") for place in places)

    @property
    def dtype(self) -> torch.dtype:
        """That of most tensors."""
        return main_dtype(self.tensors) or stored_dtype(self.folder)

    def with_layers(self, kept: Iterable[int]) -> Origin:
        """The same checkpoint, as the origin of a student that has these layers left."""
        return replace(self, kept=tuple(kept))

    def names(self, architecture: Architecture, total: int) -> LayerNames | None:
        """How its layers are named in the files."""
        return find_layer_names(self.tensors, architecture, total)


def origin_of(
    path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, merge_adapter: bool = False
) -> Origin:
    """The origin of students of a teacher, by its folder or hub name; of an adapter that is merged, its base.

    Raises:
        InputError: the hub has no such model, or cannot be reached.
    """
    adapter = checked_adapter(path, revision, merge=merge_adapter)
    if adapter and adapter.is_alone:
        path, revision = adapter.base, adapter.base_revision
    beside = adapter is not None and not adapter.is_alone
    return Origin(local_folder(path, revision), None, trust_remote_code, beside)


def teacher_origin(config: RunConfig) -> Origin:
    """The origin of students of a config's teacher; see `origin_of`."""
    return origin_of(
        config.teacher,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        merge_adapter=config.merge_adapter,
    )


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model's files: of a hub name, that of the hub's cache.

    Raises:
        InputError: the hub has no such model, or cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    patterns = [*HUB_FILES, *map(in_any_case, CARRIED), *(f"{name}/*" for name in CARRIED_FOLDERS)]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's refusals, and whatever the client's transport has for a lost network
        raise InputError(
            f"{path}: the model's files cannot be fetched ({reason_of(error)})",
            hint="check the name, the network and your access to it",
        ) from None


@dataclass(frozen=True)
class StoredDtypes:
    """The dtype that each of a model's tensors is stored in.

    Attributes:
        main: of most of them.
        others: of those, by the model's own names, that are stored in another floating-point dtype.
    """

    main: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.main)


def stored_dtypes(origin: Origin, model: PreTrainedModel) -> StoredDtypes:
    """The dtypes that a teacher's checkpoint is stored in, for each tensor of the model that was loaded from it."""
    architecture, main = find_architecture(model), origin.dtype
    wide = {name: FLOATS[t.dtype] for name, t in origin.tensors.items() if FLOATS.get(t.dtype, main) != main}
    if not wide:
        return StoredDtypes(main)
    in_model = LayerNames(architecture.layer_prefix())
    in_files = origin.names(architecture, len(architecture.layers))
    prefix = in_files.prefix if in_files else in_model.prefix
    pairs = {name: in_model.find(name, wide, prefix) for name in model.state_dict()}
    return StoredDtypes(main, {name: wide[other] for name, other in pairs.items() if other})
