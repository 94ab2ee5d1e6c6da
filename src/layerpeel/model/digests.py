"""Fingerprints of checkpoints: which weights a path holds, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from layerpeel.model.adapters import find_adapter
from layerpeel.model.commits import commit_of
from layerpeel.storage.files import sampled_digest

NUMBERS = 4096  # of a tensor in memory, about so many are hashed for its digest


def fingerprint(path: str | Path, dtype: torch.dtype, revision: str | None = None) -> str:
    """A hash of the path, the dtype, and the names, sizes and modification times of a folder's files.

    Of a hub name, the commit is in their place; the base of an adapter counts, too.
    """
    adapter = find_adapter(path, revision)
    base = (adapter.base, _stats(adapter.base, adapter.base_revision)) if adapter and adapter.is_alone else ()
    return hashlib.sha256(repr((str(path), _stats(path, revision), dtype, *base)).encode()).hexdigest()


def _stats(path: str | Path, revision: str | None) -> list[tuple[str, int, int]] | str:
    folder = Path(path)
    if not folder.is_dir():
        return commit_of(path, revision)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*"))]


def digests(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """For each file of a checkpoint folder, a hash of its size and of evenly spaced blocks; for a hub name, its commit.

    Training changes nearly every number, so a sample of blocks tells checkpoints apart as a full hash would.
    The files of an adapter's base count, too.

    Args:
        path: a folder or a hub name.
        revision: of a model on the hub; its default branch, if None.

    Raises:
        InputError: there is no such model.
    """
    adapter = find_adapter(path, revision)
    if adapter and adapter.is_alone:
        base = _digests(adapter.base, adapter.base_revision)
        return _digests(path, revision) | {f"base {name}": digest for name, digest in base.items()}
    return _digests(path, revision)


def digest_of_weights(model: PreTrainedModel) -> str:
    """A hash of a model in memory: its config, and of each tensor the dtype, the shape and evenly spaced numbers.

    As training changes nearly every number, a sample tells models apart.
    """
    digest = hashlib.sha256(repr([type(model).__name__, model.config.to_json_string()]).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(repr([name, value.dtype, tuple(value.shape)]).encode())
        numbers = value.reshape(-1)
        sample = numbers[:: max(1, len(numbers) // NUMBERS)].contiguous()
        digest.update(sample.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def _digests(path: str | Path, revision: str | None) -> dict[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return {"commit": commit_of(path, revision)}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model")]
    return {file.name: sampled_digest(file) for file in files}
