"""Which commit of a model on the hub is read."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download

from layerpeel.errors import InputError, reason_of

NAMING_FILES = ("config.json", "adapter_config.json")  # a model has one of them


def commit_of(path: str | Path, revision: str | None = None) -> str:
    """The commit that a revision of a model on the hub stands for now; see `cached_folder`."""
    return cached_folder(path, revision).name


def cached_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of the hub's cache with the files of a model's commit that were fetched; asks the hub where it can.

    Args:
        path: the hub's name.
        revision: a branch, tag or commit; the default branch, if None.

    Raises:
        InputError: it cannot be said.
    """
    error: Exception | None = None
    for name in NAMING_FILES:
        try:
            # The cache keeps a folder of files for each commit.
            return Path(hf_hub_download(str(path), name, revision=revision)).parent
        except Exception as failure:  # the hub's refusals, and whatever the client's transport raises
            error = error or failure
    at = f" at revision {revision}" if revision else ""
    raise InputError(
        f"no such model: {path}{at} is neither a folder here nor a model that can be loaded from the hub "
        f"({reason_of(error or Exception())})",
        hint="check the name and the revision, the network and your access to it",
    )


def check_revision(path: str | Path, revision: str | None) -> None:
    """Refuses a revision of a folder, which has none.

    Raises:
        InputError: there is one.
    """
    if revision and os.path.isdir(path):
        raise InputError(
            f"revision: {revision}, but {path} is a folder: only models on the hub have revisions",
            hint="leave it out, or name the model as on the hub",
        )
