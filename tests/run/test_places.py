"""A run is a place, not a path: moved folders go on, other content is refused, whatever the paths say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError
from layerpeel.export.student import export_student
from layerpeel.report.page import write_report
from layerpeel.run.events import Changed, Moved
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.places import find_places, load_run_config, load_run_teacher
from layerpeel.storage.files import sha256_of
from layerpeel.training.state import TrainingState
from layerpeel.training.text import TrainingText
from layerpeel.training.trainer import Trainer
from tests.families import save_texts, save_tiny, tiny_texts
from tests.faults.__main__ import outcome


def project(folder: Path, **distill: Any) -> Path:
    """A folder with a teacher, texts, tasks and the config of a run from six layers to four; gives the config."""
    save_tiny(folder / "model")
    save_texts(folder / "text.jsonl")
    save_texts(folder / "held.jsonl", tiny_texts(range(5, 10)))
    config = folder / "c.yaml"
    fields = {
        "teacher": "model",
        "output": str(folder / "run"),
        "stop": {"target_layers": 4},
        "score": {"decide": "block_influence", "tokens": 64},
        "tasks": [{"name": "held", "kind": "perplexity", "data": "held.jsonl"}],
        "distill": {
            "text": "text.jsonl",
            "tokens_per_round": 256,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "save_every": 0,
            **distill,
        },
    }
    config.write_text(yaml.safe_dump(fields))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished project, which no test may change."""
    folder = tmp_path_factory.mktemp("places") / "old"
    peel(load_config(project(folder)))
    return folder


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """That project under another name, while nothing is left at the old place."""
    folder = tmp_path / "now [here] ünder ~"
    shutil.copytree(finished, folder)
    text = (folder / "c.yaml").read_text().replace(str(finished / "run"), str(folder / "run"))
    (folder / "c.yaml").write_text(text)
    finished.rename(finished.with_name("hidden"))
    try:
        yield folder  # type: ignore[misc]
    finally:
        finished.with_name("hidden").rename(finished)


def cut(folder: Path, count: int) -> None:
    """A run as it was after so many events."""
    journal = folder / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:count]))
    shutil.rmtree(folder / "student")


def test_a_moved_project_goes_on_and_ends_as_if_it_had_stayed(finished: Path, moved: Path) -> None:
    cut(moved / "run", 4)  # after the first round
    run = peel(load_config(moved / "c.yaml"))
    assert outcome(run.folder) == outcome(finished.with_name("hidden") / "run")
    (event,) = [event for event in run.events if isinstance(event, Moved)]
    assert event.config.teacher == str(moved / "model") == run.config.teacher
    assert peel(load_config(moved / "c.yaml")).events == run.events  # it is noted once


def test_the_copy_of_the_config_in_a_moved_run_is_enough(moved: Path) -> None:
    cut(moved / "run", 4)
    config = load_run_config(moved / "run/config.yaml", [])
    assert config.output == moved / "run" and config.teacher == str(moved / "model")
    assert peel(config).finish
    elsewhere = load_run_config(moved / "run/config.yaml", [f"output={moved}/second"])
    assert elsewhere.output == moved / "second"


def test_a_moved_run_is_exported_and_reported(moved: Path, tmp_path: Path) -> None:
    run = Run(moved / "run")
    find_places(run)
    export_student(run, tmp_path / "out", 2)
    assert sha256_of(tmp_path / "out/model.safetensors") == sha256_of(moved / "run/student/model.safetensors")
    assert write_report(run, measure=False).is_file()


def test_a_teacher_that_is_gone_is_named_with_what_to_do_and_found_where_it_is_said_to_be(
    moved: Path, tmp_path: Path
) -> None:
    (moved / "model").rename(tmp_path / "teacher")
    run = Run(moved / "run")
    find_places(run)
    with pytest.raises(InputError, match=r"teacher: .* is gone") as error:
        export_student(run, tmp_path / "out", 1)
    assert "--set teacher=PATH" in str(error.value.hint) and not (tmp_path / "out").exists()
    find_places(run, [f"teacher={tmp_path / 'teacher'}"])
    assert export_student(run, tmp_path / "out", 1) == 1
    with pytest.raises(InputError, match="only the teacher's place can be set here"):
        find_places(run, ["seed=1"])


def test_another_teacher_is_not_taken_for_that_of_a_run(moved: Path, tmp_path: Path) -> None:
    other = moved / "model/config.json"
    other.write_text(other.read_text() + " ")
    run = Run(moved / "run")
    find_places(run)
    with pytest.raises(InputError, match=r"is another than when the run began \(config\.json\)"):
        load_run_teacher(run)


def renamed(config: RunConfig, folder: Path) -> RunConfig:
    """A config whose text, task and teacher have other names."""
    config = config.model_copy(deep=True)
    shutil.copytree(config.teacher, folder / "other")
    config.teacher = str(folder / "other")
    source = config.distill.text[0]
    source.path = str(shutil.copy(source.path, folder / "words.jsonl"))
    config.tasks[0].data = str(shutil.copy(config.tasks[0].model_extra["data"], folder / "rows.jsonl"))  # type: ignore
    return config


def test_renamed_files_with_the_same_content_are_no_change(moved: Path, tmp_path: Path) -> None:
    run = peel(renamed(load_config(moved / "c.yaml"), tmp_path))
    assert isinstance(run.events[-1], Moved) and run.config.distill.text[0].path.endswith("words.jsonl")


def test_other_rows_of_a_task_are_refused_by_name_and_cannot_be_accepted(moved: Path) -> None:
    save_texts(moved / "held.jsonl", tiny_texts(range(6, 11)))
    for accept in (False, True):
        with pytest.raises(InputError, match=r"tasks: the rows of 'held' are others than when the run began"):
            peel(load_config(moved / "c.yaml"), accept_changes=accept)


def test_other_training_text_is_refused_by_name_and_may_be_accepted(moved: Path) -> None:
    lines = (moved / "text.jsonl").read_text().splitlines()
    (moved / "text.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(InputError, match=r"distill\.text: the text in .*text\.jsonl is another than") as error:
        peel(load_config(moved / "c.yaml"))
    assert "--accept-changes" in str(error.value.hint)
    run = peel(load_config(moved / "c.yaml"), accept_changes=True)
    (event,) = [event for event in run.events if isinstance(event, Changed)]
    assert event.data.text != run.start.data.text  # type: ignore[union-attr]
    assert peel(load_config(moved / "c.yaml")).events == run.events


def test_a_record_without_digests_is_compared_by_its_paths(moved: Path) -> None:
    run = Run(moved / "run")
    assert run.start and run.start.data.tasks.keys() == {"held"} and run.start.data.text.keys() == {"distill.text.0"}
    old = run.start.model_copy(update={"data": type(run.start.data)(), "folder": ""})
    run.events[0] = old
    assert run.data.tasks == {} and not run.recorded_folder
    find_places(run)
    assert run.config == old.config


def stop_in_training(config: RunConfig, rounds: int) -> None:
    """Runs until the third step of the training after so many rounds; two steps of it are saved."""
    steps: list[float] = []

    def stop(run: Run, point: dict[str, float]) -> None:
        if len(run.rounds) == rounds and "loss" in point:
            steps.append(point["loss"])
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("layerpeel.run.writing.OpenRun.track", stop)
        peel(config)
    assert (config.output / "rounds/.training").exists()


def test_state_of_training_is_not_taken_by_a_training_of_another_config(tmp_path: Path) -> None:
    """Stopped in the last pass; what trains there, and how long, is changed and accepted."""
    config = load_config(project(tmp_path, train="neighbours", last_pass={"tokens": 640, "train": "neighbours"}))
    stop_in_training(config, 2)
    other = config.model_copy(deep=True)
    assert other.distill.last_pass
    other.distill.last_pass.train, other.distill.last_pass.tokens = "everything", 128
    run = peel(other, accept_changes=True)
    assert run.last_pass and run.last_pass.training.steps == 2


def test_a_last_pass_on_other_text_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two texts has more weight is changed and accepted."""
    sources = [{"path": "text.jsonl", "weight": 3}, "held.jsonl"]
    config = load_config(project(tmp_path, text=sources, last_pass={"tokens": 256}))
    stop_in_training(config, 2)
    states: list[Any] = []
    load = TrainingState.load
    monkeypatch.setattr(TrainingState, "load", lambda state: states.append(load(state)) or states[-1])
    other = config.model_copy(deep=True)
    first, second = other.distill.text
    first.path, second.path = second.path, first.path  # type: ignore[union-attr]
    assert peel(other, accept_changes=True).last_pass
    assert states == [None]


def test_a_training_goes_on_in_a_moved_project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_training(load_config(project(tmp_path / "a")), 1)
    (tmp_path / "a").rename(tmp_path / "b")
    steps: list[int] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda *arguments: steps.append(1) or step(*arguments))
    run = peel(load_config(tmp_path / "b/c.yaml", [f"output={tmp_path / 'b/run'}"]))
    assert outcome(run.folder) == outcome(finished / "run")
    assert len(steps) == 2  # of four, two were saved


def test_each_training_reads_on_in_the_text_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of four documents, then a last pass of eight: it reads documents 8 to 15, which are longer."""
    sizes = {"tokens_per_round": 16, "tokens_per_step": 16, "last_pass": {"tokens": 80, "train": "all"}}
    config = load_config(project(tmp_path, packing="none", **sizes))
    source = config.distill.text[0]
    source.path, source.shuffle = str(save_texts(tmp_path / "sorted.jsonl", tiny_texts([3] * 8 + [9] * 24))), 0
    lengths = []
    load = TrainingText.load

    def noted(*arguments: Any) -> Rows:
        rows = load(*arguments)
        lengths.append(rows.lengths.tolist())
        return rows

    monkeypatch.setattr(TrainingText, "load", noted)
    run = peel(config)
    assert lengths == [[4] * 4, [4] * 4, [10] * 8]  # with the end of text
    assert [each.training.tokens for each in run.rounds] == [16, 16]
    assert run.last_pass and run.last_pass.training.tokens == 80


def test_lines_of_json_and_their_order_are_what_rows_are(tmp_path: Path) -> None:
    config = load_config(project(tmp_path))
    peel(config)
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    (tmp_path / "held.jsonl").write_text("\n\n".join(json.dumps(row, indent=None) + "  " for row in rows))
    assert peel(config).finish  # written differently, they are the same rows
