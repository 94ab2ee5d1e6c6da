"""Measurements in processes of their own, and the files that they are kept in."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def measured_apart(script: str, *arguments: object) -> Any:
    """What a benchmark writes as JSON to its `--out`, from a process of its own, so that its peak of memory is its own.

    What it prints goes to the terminal; SystemExit, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, script, *map(str, arguments), "--out", str(out)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        return json.loads(out.read_text(encoding="utf-8"))


def write_record(out: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes what was measured, whole or not at all."""
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    partial.replace(out)
