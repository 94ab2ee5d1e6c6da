"""The runs below a folder, and how far each has come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from layerpeel.errors import InputError, LayerpeelError, reason_of
from layerpeel.report.gather import state_of
from layerpeel.run.folder import Run


@dataclass(frozen=True)
class RunStatus:
    """How far a run has come.

    Attributes:
        run: its folder.
        state: `running`, `finished`, `interrupted`, or `damaged` where it cannot be read.
        note: what to do next, or why it is in that state.
        last_activity: when one of its files was last written, in seconds since 1970.
        rounds: number of finished rounds.
        teacher_layers: number of the teacher's layers; None before the teacher was measured, as the fields below.
        layers: number of the result's layers, or of the last round's while the run goes on.
        last_layers: number of the last round's layers.
        kept_quality: the result's aggregate as a share of the teacher's.
    """

    run: str
    state: str
    note: str
    last_activity: float
    rounds: int | None = None
    teacher_layers: int | None = None
    layers: int | None = None
    last_layers: int | None = None
    kept_quality: float | None = None


def list_runs(folder: Path) -> list[RunStatus]:
    """The status of each run below a folder (or of the folder itself, if it is one), the latest first.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}", hint="name the folder that your runs are in")
    statuses = [_status(journal.parent) for journal in folder.rglob("journal.jsonl")]
    return sorted(statuses, key=lambda status: (-status.last_activity, status.run))


def _status(folder: Path) -> RunStatus:
    activity = max(path.stat().st_mtime for path in (folder / "journal.jsonl", *folder.glob("rounds/**/*")))
    damaged = RunStatus(str(folder), "damaged", "", round(activity, 3))
    try:
        run = Run(folder)
        state, note = state_of(run)
        return _with_progress(replace(damaged, state=state, note=note), run)
    except (LayerpeelError, ValueError, LookupError, OSError) as error:  # one bad run must not hide the others
        return replace(damaged, note=reason_of(error))


def _with_progress(status: RunStatus, run: Run) -> RunStatus:
    if not run.teacher:
        return replace(status, rounds=0)
    total = run.teacher.layers
    layers = [total, *(each.layers for each in run.rounds)]
    kept = [run.teacher.kept_quality, *(each.kept_quality for each in run.rounds)]
    return replace(
        status,
        rounds=len(run.rounds),
        teacher_layers=total,
        layers=layers[run.result_round],
        last_layers=layers[-1],
        kept_quality=kept[run.result_round],
    )
