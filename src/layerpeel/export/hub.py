"""Uploads to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from layerpeel.errors import RunError, reason_of


def push(folder: Path, repository: str, api: HfApi | None = None) -> str:
    """Uploads a checkpoint to the hub; a repository that does not exist is created, as a private one.

    Args:
        repository: as `user/name`.
        api: the client; one for the logged-in user if not given.

    Returns:
        the repository's URL.

    Raises:
        RunError: the hub cannot be reached, or refuses.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A student made by layerpeel")
    except Exception as error:  # HTTP errors, and whatever the client's transport raises without a network
        raise RunError(
            f"--push {repository}: nothing was uploaded ({reason_of(error)})",
            hint=f"the checkpoint is in {folder}; log in with `hf auth login`, check the name and the network",
        ) from None
    return str(address)
