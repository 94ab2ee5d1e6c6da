"""The teacher's hidden states on disk, for text that comes again: then the teacher's own part of a step is a read.

A file holds one row of tokens: the final hidden states and those of the layers that the losses read, in bfloat16
(what MiniLLM-style recipes call an offline teacher, but for hidden states, not logits: 2 D bytes a token instead
of 2 V).
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from layerpeel.config.run import RunConfig
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.config_fields import text_config
from layerpeel.model.digests import fingerprint
from layerpeel.processes.distributed import WORLD_SIZE
from layerpeel.storage.files import write_whole


class TeacherCache:
    """A folder of hidden states, found by the tokens that they are of.

    Args:
        folder: is made; those of other teachers beside it stay.
        teacher: says which weights and which tokenizer the states are of.
        limit: bytes that all processes may write; what comes after is computed each time.

    Attributes:
        hits, misses: rows found and not found so far.
    """

    def __init__(self, folder: Path, teacher: str, limit: int) -> None:
        self.folder = folder / hashlib.sha256(teacher.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.left = (limit - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))) // WORLD_SIZE
        self.hits = self.misses = 0

    def find(
        self, batch: Mapping[str, Tensor], layers: Collection[int], model: PreTrainedModel
    ) -> dict[int, Tensor] | None:
        """The states of a batch, if they are there of every row.

        Args:
            batch: `input_ids` and `document`, [B, T], padding included.
            layers: whose states are wanted (`forward.FINAL` for those after the final norm).
            model: whose device and dtype they are given in.

        Returns:
            for each of the layers, [B, T, D].
        """
        rows = []
        for path in self._paths(batch):
            states = self._read(path, layers)
            if states is None:
                self.misses += len(batch["input_ids"])
                return None
            rows.append(states)
        self.hits += len(rows)
        return {layer: torch.stack([row[layer] for row in rows]).to(model.device, model.dtype) for layer in layers}

    def keep(self, batch: Mapping[str, Tensor], states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Writes the states of a batch, row by row, as far as the limit allows; gives them as `find` would.

        So a step is the same to the last bit, whether or not its text was there before.
        """
        held = {layer: value.detach().to("cpu", torch.bfloat16) for layer, value in states.items()}
        for number, path in enumerate(self._paths(batch)):
            tensors = {str(layer): value[number].contiguous() for layer, value in held.items()}
            content = save(tensors, {name: str(_checksum(value)) for name, value in tensors.items()})
            if len(content) > self.left:
                break
            self.left -= len(content)
            write_whole(path, content, each_process=True)
        return {layer: held[layer].to(value.device, value.dtype) for layer, value in states.items()}

    def _paths(self, batch: Mapping[str, Tensor]) -> list[Path]:
        """A file for each row, named by its tokens and by where its documents end."""
        rows = torch.stack([batch["input_ids"], batch["document"]], dim=1).numpy()
        return [self.folder / f"{hashlib.sha256(row.tobytes()).hexdigest()}.safetensors" for row in rows]

    def _read(self, path: Path, layers: Collection[int]) -> dict[int, Tensor] | None:
        """The states in a file; None if it is not there, lacks a layer, or is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                sums = file.metadata() or {}
                states = {layer: file.get_tensor(str(layer)) for layer in layers}
        except (OSError, SafetensorError):
            return None
        return states if all(sums.get(str(n)) == str(_checksum(value)) for n, value in states.items()) else None


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.view(torch.uint8).numpy().data)


def cache_for(config: RunConfig, teacher: PreTrainedModel, folder: Path) -> TeacherCache | None:
    """The cache of a run, if it is wanted, or pays and fits (see `distill.teacher_cache`)."""
    distill = config.distill
    if distill.teacher_cache == "off" or not distill.tokens_per_round:
        return None
    sizes = text_config(teacher.config)
    every = range(sizes.num_hidden_layers)
    places = 1 + len(LossSum(distill.losses).hidden_layers(every))
    size = distill.tokens_per_round * 2 * sizes.hidden_size * places
    fits = size <= min(distill.teacher_cache_size, shutil.disk_usage(folder).free // 2)
    if distill.teacher_cache == "auto" and (distill.fresh_text or not fits):
        return None
    key = fingerprint(config.teacher, teacher.dtype, config.revision)
    return TeacherCache(folder / "cache", key, distill.teacher_cache_size)
