"""First configs: written for a model as a user has it, read back, planned and run; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from layerpeel.cli.tables import start_lines
from layerpeel.config.fields import TeacherTextConfig, TextConfig
from layerpeel.config.reading import load_config
from layerpeel.data.documents import read_documents
from layerpeel.errors import InputError
from layerpeel.plan import starting
from layerpeel.plan.fitting import SAVINGS
from layerpeel.plan.machine import make_plan
from layerpeel.plan.starting import Wishes, start
from layerpeel.run.loop import peel
from tests.families import save_texts, save_tiny, tiny_config, tiny_texts, tiny_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: Callable[..., None]) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wishes_for(model: Path | str, **fields: object) -> Wishes:
    return replace(Wishes(str(model), Path("my.yaml"), harness=False), **fields)  # type: ignore[arg-type]


def refused(wishes: Wishes) -> tuple[str, str | None]:
    """Message and hint; nothing is left."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(InputError) as caught:
        start(wishes)
    assert sorted(Path.cwd().rglob("*")) == before
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text", "gpt2", "mamba"])
def test_a_config_from_a_model_alone(family: str, folder: Path) -> None:
    started = start(wishes_for(save_tiny(folder / "models/tiny", family), minutes=20))
    assert started.files == [Path("my.yaml"), Path("my-held-out.jsonl")]
    config = load_config("my.yaml")
    assert config.teacher == str(folder / "models/tiny") and config.output == Path("runs/my")
    assert config.stop.target_layers == 5  # of six: four fifths, rounded
    (source,) = config.distill.text
    assert isinstance(source, TeacherTextConfig) and source.tokens is None
    assert config.distill.sequence_length <= 256
    planned = make_plan(config, gpus=1, fsdp=False, flops=None, bandwidth=2e12)  # as `layerpeel plan` does
    assert 0.6 * 20 * 60 < sum(planned.seconds.values()) <= 0.9 * 20 * 60
    rows = [json.loads(line) for line in Path("my-held-out.jsonl").read_text().splitlines()]
    assert 16 <= len(rows) <= 32 and all(row["text"].strip() for row in rows)
    for line in Path("my.yaml").read_text().splitlines():
        assert line.count("#") <= 1 and len(line) <= 140


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "text.jsonl"])
def test_what_is_written_runs(text: str | None, folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "FIRST_TOKENS", {"cpu": 2048})
    save_texts(folder / "text.jsonl", tiny_texts([40] * 60))
    started = start(wishes_for(teacher, text=text, target_layers=5, minutes=3))
    run = peel(load_config("my.yaml"))
    assert run.finish and run.finish.reason == "target_layers" and run.student_folder.is_dir()
    assert run.last_pass
    tokens = started.choices.rounds * started.choices.tokens_per_round
    assert run.last_pass.training.tokens == pytest.approx(tokens, rel=0.05)


def test_text_of_the_users(folder: Path, teacher: Path) -> None:
    (folder / "corpus").mkdir()
    texts = tiny_texts([20] * 30)
    for number in range(3):
        save_texts(folder / f"corpus/{number}.jsonl", texts[10 * number : 10 * number + 10])
    started = start(wishes_for(teacher, text="corpus"))
    config = load_config("my.yaml")
    (source,) = config.distill.text
    assert isinstance(source, TextConfig) and (source.path, source.hold_out) == (str(folder / "corpus"), 10)
    held = [json.loads(line)["text"] for line in Path("my-held-out.jsonl").read_text().splitlines()]
    trained = list(read_documents(source))
    assert sorted(held + trained) == sorted(texts) and len(held) == 3  # type: ignore[type-var]
    assert started.choices.limit == 3 and started.plan.seconds["evaluation"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "text.jsonl"])
def test_tasks_of_the_harness_rank_the_layers(
    text: str | None, folder: Path, teacher: Path, local_tasks: list[str]
) -> None:
    save_texts(folder / "text.jsonl")
    started = start(wishes_for(teacher, text=text, harness=True, minutes=600))
    config = load_config("my.yaml")
    assert [task.name for task in config.tasks] == [*local_tasks, *(["held_out"] if text else [])]
    assert (
        config.score.decide == "task_quality" and config.score.shortlist and config.score.shortlist.by == "teacher_kl"
    )
    assert Path("my-held-out.jsonl").exists() == bool(text) and len(started.files) == 1 + bool(text)
    planned = make_plan(config, gpus=1, fsdp=False, flops=None, bandwidth=2e12)
    assert planned.seconds == pytest.approx(started.plan.seconds)


def test_without_the_hub_a_note_says_why(
    folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting, "harness_measures", lambda parameters, tokenizer: ([], "no network"))
    start(wishes_for(teacher, harness=True))
    assert "note: no network; quality is measured on text" in capsys.readouterr().err
    assert [task.name for task in load_config("my.yaml").tasks] == ["held_out"]


def test_a_config_in_another_folder_names_the_model_in_full(folder: Path, teacher: Path) -> None:
    (folder / "models").symlink_to(teacher.parent)
    (folder / "configs").mkdir()
    save_texts(folder / "text.jsonl")
    for file, path in (("beside.yaml", "models/teacher"), ("configs/far.yaml", str(folder / "models/teacher"))):
        start(wishes_for("models/teacher", file=Path(file), text="text.jsonl"))
        assert f"teacher: {path}" in Path(file).read_text().splitlines()
        assert load_config(file).teacher == str(folder / "models/teacher")


def test_a_longer_time_and_another_depth(folder: Path, teacher: Path) -> None:
    save_texts(folder / "text.jsonl")
    chosen = [
        start(wishes_for(teacher, file=Path(f"{layers}.yaml"), text="text.jsonl", target_layers=layers)).choices
        for layers in (5, 3)
    ]
    assert [each.target_layers for each in chosen] == [5, 3]
    assert chosen[0].tokens_per_round > chosen[1].tokens_per_round  # the time is shared by three rounds


def test_what_is_there_stays(folder: Path, teacher: Path) -> None:
    for name in ("my.yaml", "my-held-out.jsonl"):
        (folder / name).write_text("mine")
        assert refused(wishes_for(teacher)) == (
            f"--output: {name} is there already",
            "name another file, or move it away",
        )
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    assert refused(wishes_for(teacher, file=Path("none/my.yaml"))) == (
        "--output: there is no folder none",
        "make it, or name a file in another",
    )


def test_depths_that_cannot_be_reached(teacher: Path) -> None:
    assert refused(wishes_for(teacher, target_layers=6)) == (
        "stop.target_layers: 6 is not below the teacher's depth of 6 layers",
        "set it to 5 or less",
    )
    assert (
        refused(wishes_for(teacher, target_layers=1))[0]
        == "stop.target_layers: 1 cannot be reached: 2 of 6 layers are protected"
    )


def test_models_that_are_none(folder: Path) -> None:
    assert refused(wishes_for(folder / "nothing"))[0].startswith(f"no such model: {folder / 'nothing'} is neither")
    (folder / "empty").mkdir()
    assert (
        refused(wishes_for(folder / "empty"))[0] == f"{folder / 'empty'} is not a model folder: it has no config.json"
    )


def test_a_model_far_larger_than_the_memory_is_refused_by_its_config_alone(folder: Path) -> None:
    config = tiny_config("llama", hidden_size=16_384, num_hidden_layers=200, vocab_size=128_000)
    config.save_pretrained(folder / "huge")
    message, hint = refused(wishes_for(folder / "huge", memory=24 * 2**30))
    assert message == f"{folder / 'huge'}: its weights alone take 112 GB of memory or more, and there are 25.8 GB"
    assert hint == starting.REMEDY + starting.OR_STREAM


def test_a_model_that_plan_finds_too_large_is_refused(folder: Path, teacher: Path) -> None:
    message, hint = refused(wishes_for(teacher, memory=2**20))
    assert message.startswith(f"{teacher}: the smallest run of it takes ") and message.endswith("there are 1.05 MB")
    assert hint == starting.REMEDY + starting.OR_STREAM
    text = save_texts(folder / "text.jsonl")
    message, hint = refused(wishes_for(teacher, memory=2**20, text=str(text)))
    assert message.startswith(f"{teacher}: the smallest run of it takes ") and hint == starting.REMEDY


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers take more than all else in memory."""
    folder = tmp_path_factory.mktemp("deep") / "teacher"
    config = tiny_config("llama", hidden_size=128, intermediate_size=1024, num_hidden_layers=24)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_read_from_disk(
    folder: Path, deep_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpeel.plan.planning.resident_bytes", lambda: 0.0)
    monkeypatch.setattr(starting, "FIRST_TOKENS", {"cpu": 2048})
    monkeypatch.setitem(SAVINGS, "scoring", [{"score_memory": 2**20}])
    monkeypatch.setattr("layerpeel.plan.machine.seconds_to_read", lambda *_: 1e-9)
    text = str(save_texts(folder / "text.jsonl", tiny_texts() * 10))
    wishes = wishes_for(deep_teacher, text=text, target_layers=23, memory=80 * 10**6, minutes=5)
    message, hint = refused(replace(wishes, text=None))
    assert message.startswith(f"{deep_teacher}: the smallest run of it takes ") and hint and "give --text" in hint
    started = start(wishes)
    config = load_config("my.yaml")
    assert config.streams and config.distill.train == "neighbours" and started.plan.peak <= 80 * 10**6
    assert all(started.plan.read[part] > 0 for part in ("scoring", "evaluation", "training"))
    assert start_lines(started)[0] == "24 layers to 23, which are read from disk as they run, to fit into memory"
    run = peel(config)
    assert run.finish and run.finish.reason == "target_layers"


def test_a_time_that_is_too_short_is_refused(teacher: Path, speed: Callable[..., None]) -> None:
    speed({torch.float32: 1000.0})
    message, hint = refused(wishes_for(teacher, minutes=5))
    assert message.startswith("--minutes 5: the least that is of use takes about ")
    assert hint and hint.startswith("give --minutes ") and hint.endswith("--target-layers N, with N above 5")


def test_text_that_holds_nothing_back(folder: Path, teacher: Path) -> None:
    (folder / "book.txt").write_text("w5 w7")
    assert refused(wishes_for(teacher, text="book.txt"))[0].startswith("--text book.txt: it holds one document")
    assert refused(wishes_for(teacher, text="none.txt"))[0] == "no such file: none.txt"


def test_a_model_without_a_beginning_needs_text(folder: Path) -> None:
    model = save_tiny(folder / "models/tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert refused(wishes_for(model))[0].startswith(
        "text from the teacher: its tokenizer has neither a beginning-of-text nor"
    )
