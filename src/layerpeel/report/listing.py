"""The runs below a folder, and how far each has come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerpeel.errors import InputError, LayerpeelError
from layerpeel.report.gather import result_round, state_of
from layerpeel.run.folder import Run


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """What there is to say of each run below a folder (or of the folder itself, if it is one), the latest first.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}", hint="name the folder that your runs are in")
    found = [_describe(journal.parent) for journal in folder.rglob("journal.jsonl")]
    return sorted(found, key=lambda each: (-each["last_activity"], each["run"]))


def _describe(folder: Path) -> dict[str, Any]:
    activity = max(path.stat().st_mtime for path in (folder / "journal.jsonl", *folder.glob("rounds/**/*")))
    row: dict[str, Any] = {"run": str(folder), "state": "damaged", "note": "", "last_activity": round(activity, 3)}
    row |= dict.fromkeys(("rounds", "teacher_layers", "layers", "last_layers", "kept_quality"))
    try:
        run = Run(folder)
        row["state"], row["note"] = state_of(run)
        return row | _progress(run)
    except (LayerpeelError, ValueError, LookupError, OSError) as error:  # one bad run must not hide the others
        return row | {"note": str(error).splitlines()[0] if str(error) else type(error).__name__}


def _progress(run: Run) -> dict[str, Any]:
    if not run.teacher:
        return {"rounds": 0}
    result, start = result_round(run), run.teacher["layers"]
    event = run.rounds[result - 1] if result else run.teacher
    return {
        "rounds": len(run.rounds),
        "teacher_layers": start,
        "layers": len(event["kept"]) if result else start,  # of the result
        "last_layers": len(run.rounds[-1]["kept"]) if run.rounds else start,
        "kept_quality": event["kept_quality"],
    }
