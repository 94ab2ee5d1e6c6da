"""Files that are written whole or not at all, by the main process unless a function says that each process writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layerpeel.errors import InputError, RunError
from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.outputs import absolute, disk_is_full, is_empty

BLOCK, BLOCKS = 2**16, 256  # of a file, those that are hashed for its digest: bytes of each, and about how many


def write_whole(path: Path, content: bytes | str, *, each_process: bool = False) -> None:
    """Writes a file under another name, and renames it once it is on the disk.

    Args:
        each_process: each process writes, not only the main one.
    """
    if each_process or is_main_process():
        with whole_file(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write a file under; at the end of the context it takes the place of `path`, unless it failed.

    Each process that calls this writes.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def partial_of(folder: Path) -> Path:
    """Where to write a folder that `replace_folder` will put in its place.

    That is in an empty folder itself, if it is there: it may be the working folder or a mounted disk, which cannot be
    replaced; else it is beside it.
    """
    folder = absolute(folder)
    return folder / ".new.partial" if is_empty(folder) else folder.with_name(f".{folder.name}.partial")


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, or of none; each process that calls this does.

    Args:
        new: as `partial_of` named it. If that is in `folder`, its files go there one by one, config.json last, without
            which nothing is taken for a checkpoint.
    """
    sync_folder(new)
    folder = absolute(folder)
    if new.parent == folder:
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
        new.rmdir()
        _sync(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Returns once a folder and all in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under another name, and puts it in the place of the one there; the main process does.

    Args:
        write: fills the empty folder that it is given.
    """
    if is_main_process():
        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        write(partial)
        replace_folder(partial, folder)


def write_json(path: Path, value: Any) -> None:
    """Writes a file to be read by people, too, into a folder that is not yet in its place."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def json_digest(values: Any) -> str:
    """A hash of plain values, the same in whichever order their keys are; what is no plain value counts as its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sampled_digest(file: Path) -> str:
    """A hash of a file's size and of evenly spaced blocks: of all of it, up to 16 MiB."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]


def make_folder(folder: Path, name: str) -> None:
    """Makes a folder with an empty file, if it has none of that name yet; the main process does.

    Raises:
        InputError: the folder holds something else, or cannot be written to.
    """
    if not is_main_process():
        return
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            path.touch()
        if path.is_file():
            path.open("ab").close()  # raises where it may not be written
            return
    except OSError as error:
        if disk_is_full(error):
            raise
        raise InputError(
            f"output: {folder} cannot be written to ({error.strerror})",
            hint="name a folder that can (--set output=...), or change its permissions",
        ) from None
    raise InputError(
        f"output: {folder} is not empty, and what it holds is no run",
        hint="name a new or an empty folder (--set output=...)",
    )


def remove_paths(*paths: Path) -> None:
    """Removes files and folders, where they exist; the main process does."""
    if not is_main_process():
        return
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path, names: Sequence[str]) -> None:
    """Removes a folder with the files of these names, but keeps it if it holds others; the main process does."""
    remove_paths(*(folder / name for name in names))
    if is_main_process():
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def sweep(folder: Path) -> None:
    """Removes what writers that were killed have left half written; the main process does."""
    if is_main_process():
        remove_paths(*folder.rglob(".*.partial"), *folder.rglob(".*.old"))


def hash_files(folder: Path, root: Path, *, but: Sequence[str] = ()) -> dict[str, str]:
    """The SHA-256 of each file that the main process wrote into a folder, by its path from `root`; {} in the others.

    Args:
        but: names of files that are left out.
    """
    paths = sorted(path for path in folder.iterdir() if path.name not in but) if is_main_process() else []
    return {path.relative_to(root).as_posix(): str(sha256_of(path)) for path in paths}


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


def _sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
