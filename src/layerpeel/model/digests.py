"""Fingerprints of checkpoints: which weights a path holds, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from layerpeel.model.loading import load_config_of
from layerpeel.storage.files import sampled_digest


def fingerprint(path: str | Path, dtype: torch.dtype) -> str:
    """A hash of the path, the dtype, and the names, sizes and modification times of a folder's files."""
    folder = Path(path)
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(path), stats, dtype)).encode()).hexdigest()


def digests(path: str | Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """For each file of a checkpoint folder, a hash of its size and of evenly spaced blocks; for a hub name, its commit.

    Training changes nearly every number, so a sample of blocks tells checkpoints apart as a full hash would.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = load_config_of(path, trust_remote_code=trust_remote_code)
        return {"commit": str(getattr(config, "_commit_hash", None))}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model")]
    return {file.name: sampled_digest(file) for file in files}
