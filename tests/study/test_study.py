"""A study's file, what its runs share, going on, several processes, and messages."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from layerpeel.errors import InputError, RunError
from layerpeel.importance.scores import LayerScores
from layerpeel.report import gather
from layerpeel.run.events import Finish, RoundEnd, Scored
from layerpeel.run.folder import Run
from layerpeel.run.opening import open_run
from layerpeel.run.results_json import evaluation_to_json
from layerpeel.storage.files import full_disk_named, sha256_of
from layerpeel.study.file import load_study
from layerpeel.study.writing import run_study
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.result import TrainingSummary


@pytest.fixture
def study(base: Path, tmp_path: Path) -> Path:
    """Two variants, two seeds, one layer, no training."""
    return write(
        tmp_path,
        {
            "base": str(base),
            "output": str(tmp_path / "out"),
            "remove": 1,
            "variants": {"by KL": {"score.decide": "teacher_kl", "score.shortlist": None}, "by tasks": {}},
            "set": {"distill.tokens_per_round": 0},
            "seeds": [0, 1],
        },
    )


def write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder / "study.yaml"


def journals(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("journal.jsonl")}


@pytest.mark.slow
def test_a_teacher_is_measured_once_and_a_study_goes_on_where_it_stopped(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerpeel.study import running

    measured, started, peel = [], [], running.peel
    evaluate = running.evaluate
    monkeypatch.setattr(running, "evaluate", lambda *a: measured.append(1) or evaluate(*a))

    def interrupted(config: Any) -> Run:
        started.append(config.output)
        if len(started) == 3:
            raise KeyboardInterrupt
        return peel(config)

    monkeypatch.setattr(running, "peel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study)
    assert len(measured) == 1 and len({json.dumps(evaluation_to_json(Run(path).reference)) for path in started}) == 1
    before = journals(tmp_path)
    first = run_study(study)
    after = journals(tmp_path)
    assert len(measured) == 1 and [str(path.parent.name) for path in started] == ["by-KL", "by-KL", *["by-tasks"] * 3]
    assert sorted(before[name] == after[name] for name in before) == [False, False, True, True]
    assert run_study(study).rows == first.rows and journals(tmp_path) == after


@pytest.mark.slow
def test_runs_that_score_alike_score_once(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerpeel.run import loop, peeling

    scored, score = [], peeling.score_candidates
    monkeypatch.setattr(peeling, "score_candidates", lambda *a: scored.append(1) or score(*a))
    variants = {
        "one": {},
        "other losses": {"distill.losses": {"kl": {}}},
        "every second": {"score.every": 2},
        "other tokens": {"score.tokens": 16},
        "healed": {"score.heal": {"keep": 2, "steps": 1}},
    }
    raw = yaml.safe_load(study.read_text()) | {"variants": variants, "seeds": [0]}
    raw["set"]["distill.tokens_per_round"] = 64
    run_study(write(tmp_path, raw))
    assert len(scored) == 3  # "other tokens" and "healed" on their own
    runs = {path.parent.name: Run(path) for path in (tmp_path / "out" / "runs").glob("*/seed-0")}
    assert runs["one"].rounds[0].scores == runs["other-losses"].rounds[0].scores
    costs = {name: gather.cost_rows(run)[0] for name, run in runs.items()}
    took = sum(
        row.scoring_seconds + row.healing_seconds + row.repair_seconds + row.training_seconds for row in costs.values()
    )
    shared = costs["one"].scoring_seconds  # of three runs
    seconds = json.loads((tmp_path / "out" / "study.json").read_text())["seconds"]
    assert seconds == pytest.approx(took - 2 * shared) and shared > 0
    alone = loop.peel(runs["other-losses"].config.model_copy(update={"output": tmp_path / "alone"}))
    for name in ("removed", "kept", "evaluation", "aggregate"):
        assert getattr(alone.rounds[0], name) == getattr(runs["other-losses"].rounds[0], name)


def test_variants_over_kernels_of_attention_share_no_measurement(study: Path) -> None:
    variants = {name: {"attn_implementation": name} for name in ("sdpa", "eager")}
    raw = yaml.safe_load(study.read_text()) | {"variants": variants, "seeds": [0]}
    run_study(write(study.parent, raw))
    for name in variants:
        teacher = Run(study.parent / "out/runs" / name / "seed-0").teacher
        assert teacher and teacher.attention == name


@pytest.mark.slow
def test_processes_give_the_numbers_of_one(study: Path, tmp_path: Path) -> None:
    alone = run_study(study)
    apart = run_study(study, [f"output={tmp_path / 'apart'}"], processes=2)
    drop = ("scoring_seconds", "training_seconds")
    for one, other in zip(alone.rows.results, apart.rows.results, strict=True):
        assert replace(one, **dict.fromkeys(drop, 0.0)) == replace(other, **dict.fromkeys(drop, 0.0))


@pytest.mark.slow
def test_a_run_that_fails_apart_is_named_and_the_others_are_done(study: Path, tmp_path: Path) -> None:
    _, jobs = load_study(study)
    with open_run(jobs[0].config) as run:
        weights = run.folder / "rounds/01/trained.safetensors"
        weights.parent.mkdir(parents=True)
        save_file({"no_such_parameter": torch.zeros(1)}, weights)  # of which a student can make nothing
        files = {"rounds/01/trained.safetensors": str(sha256_of(weights))}
        quality = {"parameters": 1, "evaluation": Evaluation({}), "aggregate": 1.0, "kept_quality": 1.0}
        run.record(Scored(round=1, removed=1, scores=LayerScores("teacher_kl", {1: 0.0})))
        run.record(RoundEnd(round=1, kept=(0, 2, 3, 4, 5), training=TrainingSummary([]), files=files, **quality))
    for job in jobs[1:3]:
        with open_run(job.config) as run:
            run.record(Finish(reason="target_layers", round=0, layers=6, last_pass=None, files={}))
    with pytest.raises(
        RunError, match=r"1 of 2 runs failed, the first of them by KL, seed 0: a bug in layerpeel: .*no_such_parameter"
    ):
        from layerpeel.study.running import run_jobs

        run_jobs(jobs, 2)
    assert Run(jobs[3].config.output).finish


@pytest.mark.slow
def test_a_run_that_diverges_is_named_and_the_others_are_done(study: Path, tmp_path: Path) -> None:
    diverges = {"distill.learning_rate": 1e38, "distill.max_skipped_steps": 0, "distill.tokens_per_round": 320}
    variants = {"diverges": diverges, "fine": {}}
    path = write(tmp_path, yaml.safe_load(study.read_text()) | {"variants": variants})
    words = (
        "2 of 4 runs failed, the first of them diverges, seed 0: training diverged.* .the others: diverges, seed 1.$"
    )
    with pytest.raises(RunError, match=words) as caught:
        run_study(path)
    assert "a study without the variants that failed has its tables" in str(caught.value.hint)
    assert all(Run(tmp_path / "out" / "runs" / "fine" / f"seed-{seed}").finish for seed in (0, 1))
    before = journals(tmp_path / "out" / "runs" / "fine")
    rows = run_study(write(tmp_path, yaml.safe_load(study.read_text()) | {"variants": {"fine": {}}})).rows.results
    assert [(row.variant, row.runs) for row in rows] == [("fine", 2)]
    assert journals(tmp_path / "out" / "runs" / "fine") == before


def test_a_run_without_memory_is_named_and_the_others_are_done(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerpeel.study import running

    _, jobs = load_study(study)
    started = []

    def too_large(config: Any) -> None:
        started.append(config.output)
        if config.output == jobs[0].config.output:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(running, "peel", too_large)
    with pytest.raises(RunError, match=r"^1 of 4 runs failed, .* by KL, seed 0: out of memory .CUDA") as caught:
        running.run_jobs(jobs, 1)
    assert "lower distill.batch_size" in str(caught.value.hint)
    assert set(started) == {job.config.output for job in jobs}


def test_a_full_disk_stops_a_study_at_once(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerpeel.study import running

    _, jobs = load_study(study)
    started = []

    def full(config: Any) -> Run:
        started.append(config.output)
        with full_disk_named(config.output):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(running, "peel", full)
    with pytest.raises(RunError, match=r"^no space left on the disk of"):
        running.run_jobs(jobs, 1)
    assert started == [jobs[0].config.output]


def test_overrides_go_to_the_study_or_to_its_base(study: Path, base: Path) -> None:
    overrides = ["model=elsewhere", "seeds=[3]", "score.tokens=48", "variants.third.score.tokens=16"]
    with pytest.raises(InputError, match="no such model: elsewhere"):
        load_study(study, overrides)
    config, jobs = load_study(study, [f"model={base.parent / 'teacher'}", *overrides[1:]])
    assert config.seeds == [3] and [job.variant for job in jobs] == ["by KL", "by tasks", "third"]
    assert [job.config.score.tokens for job in jobs] == [48, 48, 16]
    assert [job.config.seed for job in jobs] == [3, 3, 3]
    assert len({job.config.output for job in jobs}) == 3


@pytest.mark.parametrize(("remove", "left"), [(1, 5), (2, 4), (0.33, 4), (0.01, 5), (0.5, 3)])
def test_layers_may_be_a_share_of_the_teachers(study: Path, remove: float, left: int) -> None:
    _, jobs = load_study(study, [f"remove={remove}"])
    assert {job.config.stop.target_layers for job in jobs} == {left}


def test_a_grid_is_every_combination(base: Path, tmp_path: Path) -> None:
    grid = {"distill.losses.kl.weight": [0.1, 10], "score.tokens": [16, 32]}
    raw = yaml.safe_load(base.read_text()) | {"teacher": str(base.parent / "teacher")}
    raw["tasks"] = [task | {"data": str(base.parent / task["data"])} for task in raw["tasks"]]
    _, jobs = load_study(write(tmp_path, {"base": raw, "output": str(tmp_path / "out"), "grid": grid}))
    values = [(job.config.distill.losses["kl"].weight, job.config.score.tokens) for job in jobs]
    assert values == [(0.1, 16), (0.1, 32), (10, 16), (10, 32)]
    assert jobs[0].variant == "kl.weight 0.1, score.tokens 16"


@pytest.mark.parametrize("name", ["t\U0001f600.jsonl", "\u00e9 \u4e2d", 'a\u2028b\u0085c\x7fd\n\te"f\\g: #'])
@pytest.mark.parametrize("where", ["set", "variants"])
def test_any_text_may_be_a_value(study: Path, tmp_path: Path, name: str, where: str) -> None:
    fields = {"distill.text": name}
    raw = yaml.safe_load(study.read_text()) | {where: {"v": fields} if where == "variants" else fields}
    _, jobs = load_study(write(tmp_path, raw))
    assert {file.path for job in jobs for file in job.config.files_of_text().values()} == {name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a b": {}, "a-b": {}}}, "variants: 'a-b' would share its folder with 'a b'"),
        ({"grid": {"score.tokens": [1]}}, "expected a grid or variants, found both"),
        ({"variants": {}, "grid": {"seed": [1]}}, "seed: every run of a study has its own; give `seeds`"),
        ({"set": {"output": "x"}}, "output: every run of a study has its own; the study's `output` says where they"),
        ({"show": "sweep"}, "a sweep is over the one field of a grid"),
        ({"show": "rankings"}, "show: rankings by tasks are compared, and teacher_kl runs none"),
        ({"show": "curves"}, "show: input should be"),
        ({"varients": {}}, "unknown key; did you mean 'variants'"),
        ({"seeds": [0, -1]}, "seeds.1: input should be greater than or equal to 0, found -1"),
        ({"seeds": [2**32]}, "seeds.0: input should be less than 4294967296"),
        ({"seeds": [7, 1, 7]}, "seeds: 7 is there twice, and would count one run as two"),
        ({"remove": 6}, "remove: 6 of the 6 layers"),
        ({"set": {"score.decide": "teacher_lk"}}, "did you mean 'teacher_kl'"),
        ({"base": "nowhere.yaml"}, "no such config: nowhere.yaml"),
        ({"variants": {"x": {"distil.radius": 2}}}, "did you mean 'distill'"),
    ],
)
def test_messages_before_any_run(study: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = yaml.safe_load(study.read_text())
    with pytest.raises(InputError, match=message):
        run_study(write(tmp_path, raw | changes))
    assert not list(tmp_path.rglob("journal.jsonl"))


@pytest.mark.parametrize("base", ["demo", "nowhere.yaml"])
def test_a_file_in_place_of_the_output_is_named_before_anything_is_written(base: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    study = write(tmp_path, {"base": base, "output": str(tmp_path / "out")})
    with pytest.raises(InputError, match=rf"output: {tmp_path / 'out'} cannot be a folder: .*out is a file"):
        run_study(study)
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
