"""Students of published models without healing, and environments that are made for them outside of the repository."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from layerpeel.export.timing import PROMPT, Load

REMOVED = {  # from the folder of models: layers, and the student's name
    "smollm2-135m": ("17,14,5,26,25,12", "smollm2-24"),
    "qwen2.5-coder-0.5b": ("10-15", "qwen2.5-coder-18"),
    "gemma3-270m": ("3,4", "gemma3-16"),  # breaks its cycle of six layers
}

LOAD = Load([17 + 97 * place % 20011 for place in range(PROMPT)])  # token ids that all of them have


def make_student(models: Path, name: str, folder: Path) -> Path:
    """A model without some layers, made once."""
    layers, student = REMOVED[name]
    target = folder / student
    if not (target / "config.json").is_file():
        layerpeel("remove", str(models / name), "--layers", layers, "-o", str(target))
    return target


def make_environment(folder: Path, *packages: str, without: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment with packages from the index, made once.

    Args:
        without: packages that come along and do not work with the torch of this machine.
    """
    python, mark = folder / "bin" / "python", folder / ".made"
    if not mark.is_file():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        if without:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *without], check=True)
        mark.touch()
    return python


def layerpeel(*arguments: str) -> str:
    """What the command printed; its exit code may say that a runtime is wrong."""
    done = subprocess.run([sys.executable, "-m", "layerpeel", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"layerpeel {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def summary(verdict: dict) -> dict:
    """A verdict without its single positions."""
    return {name: value for name, value in verdict.items() if name not in ("positions", "kl", "path")}
