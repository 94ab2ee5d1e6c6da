"""Steps that several verbs of the command line share."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from layerpeel.cli.app import output
from layerpeel.cli.tables import run_table
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.importance.estimate import Estimate
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_teacher
from layerpeel.model.streaming import load_streamed
from layerpeel.processes.distributed import RANK
from layerpeel.processes.progress import console, shown
from layerpeel.run.events import event_to_json
from layerpeel.run.folder import Run
from layerpeel.run.preflight import check_output


def _finish(run: Run, as_json: bool, report: bool = True) -> None:
    """Writes the report of a finished run, and prints what came of it; exits with 3 at the quality floor."""
    assert run.finish
    if not RANK:
        from layerpeel.report.page import write_report

        _show(run, write_report(run) if report else None, as_json)
    if run.finish.reason == "min_quality":
        console.print(f"stopped by the quality floor; the student is that of round {run.finish.round}")
        sys.exit(3)


def _show(run: Run, page: Path | None, as_json: bool) -> None:
    assert run.teacher and run.finish
    if as_json:
        print(
            json.dumps(
                {
                    "teacher": event_to_json(run.teacher),
                    "rounds": [event_to_json(each.scored) | event_to_json(each.end) for each in run.rounds],
                    "finish": event_to_json(run.finish),
                    "student": str(run.student_folder),
                    "report": str(page) if page else None,
                }
            )
        )
        return
    output.print(run_table(run))
    for name, path in (("student", run.student_folder), ("report", page), ("record", run.journal)):
        if path:
            output.print(f"{name:8} {shown(path)}", soft_wrap=True)


def _announce(estimates: list[Estimate]) -> None:
    for each in estimates:
        console.print(
            f"{each.metric}: {each.tokens:,} tokens, {each.layer_runs} layer runs on each (one by one: "
            f"{each.one_by_one}), about {each.seconds:,.0f} s, up to {each.memory / 2**30:.2g} GB beside the weights",
            style="dim",
            soft_wrap=True,
        )


def _load_layerwise(settings: RunConfig) -> tuple[LayerwiseModel, Any]:
    if settings.score.weights == "stream":
        files, tokenizer = load_streamed(
            settings.teacher,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        return LayerwiseModel(files.model, files.weights_loaded), tokenizer
    model, tokenizer = load_teacher(settings)
    return LayerwiseModel(model), tokenizer


def _parse_layers(text: str) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"--layers {text}: expected layer numbers", hint="as in --layers 5,7 or --layers 5-8")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise InputError(f"--layers {text}: layer {twice[0]} is named twice", hint="name each layer once")
    return layers


def _check_free(folder: Path, model: str) -> None:
    check_output(folder, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output: {folder} is not empty", hint="name a new or an empty folder")
