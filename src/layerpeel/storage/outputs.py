"""Tries where output is to go, before the work that makes it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from layerpeel.errors import InputError, reason_of


def absolute(folder: Path) -> Path:
    """The path without `.` and `..`, so that it has a name and a parent; links stay."""
    return Path(os.path.abspath(folder))


def beside(folder: Path, suffix: str) -> Path:
    """The folder of the same name with a suffix, also where a path names it by dots."""
    folder = absolute(folder) if folder.name in ("", "..") else folder
    return folder.with_name(f"{folder.name}{suffix}")


def windows_hint(path: str | Path) -> str | None:
    """What to do about a path of Windows on another system; None if it is none."""
    is_windows = re.match(r"[A-Za-z]:[\\/\x00-\x1f]|\\\\", str(path))
    return (
        "a path of Windows leads nowhere here: give the one of this system" if is_windows and os.name != "nt" else None
    )


def is_empty(folder: Path) -> bool:
    """Whether it is a folder with nothing in it but what a writer that was killed has left half written."""
    return folder.is_dir() and all(path.name.endswith(".partial") for path in folder.iterdir())


def check_output(folder: Path, model: str) -> None:
    """Checks that something can be written in a folder that may not be there yet.

    Raises:
        InputError: there is a file in its place or above it, it is in the folder of the model, or may not be written.
    """
    another = "name another folder"
    if hint := windows_hint(folder):
        raise InputError(f"output: {folder} cannot be a folder", hint=hint)
    try:
        resolved = absolute(folder).resolve()
        above = next(each for each in (resolved, *resolved.parents) if each.exists())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"output: {folder} cannot be a folder ({reason_of(error)})", hint=another) from None
    if not above.is_dir():
        raise InputError(f"output: {folder} cannot be a folder: {above} is a file", hint=another)
    if os.path.isdir(model) and resolved.is_relative_to(Path(model).resolve()):
        raise InputError(f"output: {folder} is in the folder of the model, {model}", hint=another)
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"output: you may not write in {above}", hint=another)
    try_folder(folder)


def try_folder(folder: Path) -> None:
    """Writes and renames in a folder, or in the one that it will be made in, and takes that away again.

    Raises:
        InputError: that cannot be done; it says why.
    """
    folder = absolute(folder)
    above = next(each for each in (folder, *folder.parents) if each.is_dir())
    probe = above / f".{folder.name[:200]}.{os.getpid()}.partial"
    renamed = probe.with_name(f".{folder.name[:200]}.{os.getpid()}.renamed.partial")
    try:
        if above != folder:
            os.stat(folder.parent / f".{folder.name}.partial")  # raises where the name is too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"output: {folder} cannot be a folder ({error.strerror})", hint="name another") from None
    try:
        probe.mkdir()
        (probe / "file").write_bytes(bytes(4096))
        os.replace(probe, renamed)
    except OSError as error:
        raise InputError(
            f"output: nothing can be written in {above} ({error.strerror})",
            hint="free some space" if disk_is_full(error) else "name another folder, or change its permissions",
        ) from None
    finally:
        for path in (probe, renamed):
            shutil.rmtree(path, ignore_errors=True)


def check_space(folder: Path, size: int, what: str) -> None:
    """Checks that the disk of a folder has room for so many bytes.

    Args:
        what: takes them, for the message.

    Raises:
        InputError: it has not.
    """
    folder = absolute(folder)
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free
    if size > free:
        raise InputError(
            f"output: no space left on the disk of {folder}: {what} takes {size:,} bytes or more, {free:,} are free",
            hint="free some space, or name a folder on another disk",
        )


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says so; the safetensors library has no number for it, only words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)
