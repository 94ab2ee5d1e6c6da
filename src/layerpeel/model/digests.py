"""What tells one checkpoint from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from layerpeel.model.loading import load_config_of

BLOCK, BLOCKS = 2**16, 256  # of a file that is told from another: bytes of each, and how many


def fingerprint(path: str | Path, dtype: torch.dtype) -> str:
    """Says which weights a path holds, without reading them: names, sizes and times of its files, and the dtype."""
    folder = Path(path)
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(path), stats, dtype)).encode()).hexdigest()


def digests(path: str | Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """What tells one checkpoint from another: of each file in a folder, a hash of its size and of blocks all over it.

    Training moves nearly every number, so that blocks see what a hash of the whole would, in a moment. Of a hub name,
    the commit that was loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = load_config_of(path, trust_remote_code=trust_remote_code)
        return {"commit": str(getattr(config, "_commit_hash", None))}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model")]
    return {file.name: _digest(file) for file in files}


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]
