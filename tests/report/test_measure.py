"""Speed, memory and samples, measured of the students that a run holds."""

from __future__ import annotations

import pytest
import torch

from layerpeel.report import measure
from layerpeel.report.measure import measurements, most_allocated, sample_prompts
from layerpeel.report.measurements import Measurements
from layerpeel.report.page import write_report
from layerpeel.run.folder import Run
from tests.families import tiny_model, tiny_tokenizer
from tests.report.conftest import HOSTILE


def test_without_the_teacher_it_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.config.teacher += "/gone"
    text = write_report(run).read_text(encoding="utf-8")
    assert "were not measured, because the students cannot be rebuilt: teacher: " in text and "/gone is gone; " in text
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing measured: teacher: " in said and "/gone is gone" in said
    assert not (run.folder / "report/measurements.json").exists()


def test_measurements_are_made_of_every_depth_and_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerpeel.report.measure.TURN_SECONDS", 0.0)
    monkeypatch.setattr("layerpeel.report.measure.REPEATS", 2)
    monkeypatch.setattr("layerpeel.report.measure.NEW", 4)
    assert measurements(run, measure=False) is None
    measured = measurements(run)
    assert isinstance(measured, Measurements) and list(measured.depths) == [0, 1, 2]
    assert run.teacher
    parameters = [run.teacher.parameters, *(each.parameters for each in run.rounds)]
    for count, speed in zip(parameters, measured.depths.values(), strict=True):
        assert speed.peak_memory > 4 * count  # float32 weights, and something on top
        assert 0 < speed.ms_per_token_least <= speed.ms_per_token <= speed.ms_per_token_most
    peaks = [speed.peak_memory for speed in measured.depths.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert [sample.source for sample in measured.samples] == [HOSTILE, HOSTILE]
    assert measured.samples[0].prompt == "w5 w9"
    monkeypatch.setattr("layerpeel.report.measure.measure_run", None)
    assert measurements(run) == measured  # not measured again
    text = write_report(run).read_text(encoding="utf-8")
    assert "ms/token" in text and "Peak memory is" in text


def test_measurements_that_cannot_be_kept_are_in_the_report(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    measured = object()
    monkeypatch.setattr("layerpeel.report.measure.measure_run", lambda run: measured)
    monkeypatch.setattr("layerpeel.report.measure.write_measurements", refuse)
    assert measurements(run) is measured
    assert "the measurements are in the report alone" in capsys.readouterr().err


def test_the_most_that_was_allocated_at_once() -> None:
    torch.zeros(10)  # what a first call sets up is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.zeros(1000, 1000)  # 4 MB
        second = torch.zeros(500, 1000)  # and 2: 6 at once
        del first
        third = torch.zeros(750, 1000)  # 2 + 3
    assert most_allocated(profile) == 6_000_000
    assert second.numel() + third.numel()


def test_without_generation_tasks_prompts_are_beginnings_of_the_text(run: Run) -> None:
    config = run.config.model_copy(update={"tasks": run.config.tasks[:1]})
    ((source, request),) = sample_prompts(config, tiny_tokenizer())
    assert source == "text" and tiny_tokenizer().decode(request.prompt).startswith("w5 w9 w7 w8 w4 w6 w5")
    assert len(request.prompt) == 24
    config.distill.text[0].path = "gone"
    assert sample_prompts(config, tiny_tokenizer()) == []


def test_a_model_whose_text_has_a_config_of_its_own_is_timed() -> None:
    measure._generate(tiny_model("gemma3"), rows=1, new=2)
