"""Digests of rows and of texts: whether data are what they were, wherever they are now."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerpeel.config.fields import TextConfig
from layerpeel.data.reading import files_of, is_hub_text
from layerpeel.storage.files import sampled_digest

COMMIT = re.compile("[0-9a-f]{40}")


def digest_of_rows(rows: Iterable[Any]) -> str:
    """A hash of rows, and of their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> str:
    """A value that JSON does not know, as text without its address in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def digest_of_text(source: TextConfig) -> str | None:
    """A hash of the files that a source is read from, in their order, without their names; the commit of a hub dataset.

    Of a large file only a sample of blocks is read.

    Returns:
        None where there is no such file; and for a hub dataset whose commit is not known, as of one without a network
        that was never here.
    """
    if is_hub_text(source.path):
        return _commit_of(source.path) or _cached_commit(source.path, source.name)
    digest, files = hashlib.sha256(), files_of(source.path)
    if not all(map(os.path.exists, files)):
        return None
    for file in files:
        digest.update(sampled_digest(file).encode())
    return digest.hexdigest()[:16]


def version_of_text(source: TextConfig) -> list[Any] | None:
    """What tells the content of a source from what it may hold later: its digest, and when its files were changed.

    Returns:
        None where `digest_of_text` gives that.
    """
    digest = digest_of_text(source)
    if digest is None:
        return None
    files = [] if is_hub_text(source.path) else files_of(source.path)
    return [digest, *([file.name, file.stat().st_mtime_ns] for file in files)]


def _commit_of(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # no such name, no network, or no access: whoever reads it will say so
        return None


def _cached_commit(name: str, subset: str | None) -> str | None:
    """The commit of a dataset's latest copy in the cache of `datasets`, which is what that reads without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, dataset = name.split("/")
    root = Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(dataset)]))
    copies = [path for path in root.glob(f"{glob.escape(subset or '') or '*'}/*/*") if COMMIT.fullmatch(path.name)]
    return max(copies, key=lambda path: path.stat().st_mtime).name if copies else None
