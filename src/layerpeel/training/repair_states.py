"""The projections that a repair has solved, kept on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerpeel.model.tensor_files import StoredTensor, tensors_in
from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.files import remove_paths, whole_file
from layerpeel.training.result import RepairedProjection


class RepairState:
    """A folder for the projections that a repair has solved, a file a layer; a repair that was stopped goes on there.

    Args:
        of: says which weights are repaired: what the folder holds of others, or of another repair, is not used.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self.folder, self.of = folder, of

    def for_repair(self, settings: str) -> RepairState:
        """The same place, for a repair whose settings and text have this hash."""
        return RepairState(self.folder, f"{self.of} {settings}")

    def save(self, layer: int, weights: Mapping[str, Tensor], projections: list[RepairedProjection]) -> None:
        """Keeps what was solved of a layer; of several processes the first writes."""
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"of": self.of, "projections": json.dumps([asdict(each) for each in projections])}
        with whole_file(self._path(layer)) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial, header)

    def load(self, layer: int) -> tuple[dict[str, Tensor], list[RepairedProjection]] | None:
        """What was solved of a layer; None if it was not, or the file is damaged."""
        try:
            with safe_open(self._path(layer), framework="pt") as file:
                header = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if header.get("of") != self.of:
            return None
        return weights, [RepairedProjection(**each) for each in json.loads(header["projections"])]

    def tensors(self, layers: Iterable[int]) -> dict[str, StoredTensor]:
        """What was solved of some layers: where the parameters lie, by name."""
        return {name: stored for layer in layers for name, stored in tensors_in(self._path(layer)).items()}

    def clear(self) -> None:
        remove_paths(self.folder)

    def _path(self, layer: int) -> Path:
        return self.folder / f"{layer}.safetensors"
