"""Files written whole or not at all, told apart by their hashes; and what to say when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpeel.errors import RunError


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file under another name, and renames it once it is on the disk."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write a file under; at the end of the context it takes the place of `path`, unless it failed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, or of none."""
    for path in (*new.rglob("*"), new):
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what writers that were killed have left half written."""
    for path in [*folder.rglob(".*.partial"), *folder.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file, in hexadecimal; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk, whichever library has them, into a message that names the folder.

    Raises:
        RunError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise RunError(
            f"no space left on the disk of {folder}; all files in it are whole",
            hint=f"free some space ({folder / 'cache'} may go, if it is there), then run the same command again: "
            "it goes on from where it was",
        ) from None


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says so; the safetensors library has no number for it, only words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def _sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
