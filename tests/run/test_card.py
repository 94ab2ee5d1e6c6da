"""Model cards, exports and uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from layerpeel.config.fields import TextConfig
from layerpeel.errors import InputError, RunError
from layerpeel.export.hub import push
from layerpeel.export.student import export_student
from layerpeel.model.loading import load_model
from layerpeel.run.card import markdown, source_name, write_card
from layerpeel.run.folder import Run


def test_peel_leaves_a_card_beside_the_student(run: Run) -> None:
    card = ModelCard.load(run.student_folder / "README.md")
    head = card.data.to_dict()
    assert (head["base_model"], head["library_name"], head["pipeline_tag"]) == (
        "teacher",
        "transformers",
        "text-generation",
    )
    assert (head["license"], head["license_name"], head["language"]) == ("other", "tiny-licence", ["en", "ru"])
    order = ", ".join(str(event.removed) for event in run.rounds)
    assert run.teacher and run.finish
    last = run.finish.last_pass
    assert last
    tokens = sum(event.training.tokens for event in [*run.rounds, last])
    for words in (
        f"Teacher layers removed, in this order (counted from 0): {order}.",
        "arXiv 2511.05085",
        f"{tokens} tokens in all",
        f"{last.training.tokens} were a last pass",
        f"{run.teacher.evaluation.scores['=ppl'].value:.1f} ±",
        f"{last.evaluation.scores['=ppl'].value:.1f} ±",
        "from_pretrained(path)",
    ):
        assert words in card.text
    assert str(run.folder.parent) not in str(card)  # no path of the machine
    assert "as of commit" not in card.text  # of a folder there is none


def test_a_cards_words_from_outside_are_no_markup(run: Run) -> None:
    text = (run.student_folder / "README.md").read_text(encoding="utf-8")
    assert "<script" not in text.replace("\\<script", "") and "\u202e" not in text
    row = next(line for line in text.splitlines() if "owned" in line)
    assert row.replace("\\|", "").count("|") == 5  # four cells, as in the other rows
    assert markdown("![x](http://y)") == "\\!\\[x\\]\\(http\\://y\\)"


@pytest.mark.parametrize("readme", [None, "no head", "---\nlicense: [\n---\n", "---\nlanguage: en\n---\n"])
def test_without_a_licence_the_card_says_so(run: Run, tmp_path: Path, readme: str | None) -> None:
    (tmp_path / "teacher").mkdir()
    if readme is not None:
        (tmp_path / "teacher/README.md").write_text(readme)
    run.config.teacher = str(tmp_path / "teacher")
    card = ModelCard.load(write_card(run, tmp_path, 1))
    assert card.data.license is None and "look it up before you pass this model on" in card.text
    assert "1 of its 6 layers removed" in card.text


def test_datasets_of_the_hub_are_named(run: Run, tmp_path: Path) -> None:
    names = ["mlfoundations/dclm-baseline-1.0", "squad"]
    files = [str(tmp_path / "secret/mine.jsonl"), "gone/mine.jsonl"]
    run.config.distill.text = [TextConfig(path=path) for path in [*names, *files]]
    card = ModelCard.load(write_card(run, tmp_path, 1))
    assert card.data.datasets == names
    assert [source_name(text) for text in run.config.distill.text] == [*names, "mine.jsonl", "mine.jsonl"]


def test_an_export_is_the_rounds_student(run: Run, tmp_path: Path) -> None:
    assert export_student(run, tmp_path / "last") == 2  # after the last pass, which rounds know nothing of
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "last", run.student_folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert export_student(run, tmp_path / "first", 1) == 1
    model, _ = load_model(tmp_path / "first")
    assert model.config.num_hidden_layers == 5
    kept = run.rounds[0].kept
    trained = load_file(run.folder / "rounds/01/trained.safetensors")
    for name, value in trained.items():
        layer = int(name.split(".")[2])
        assert torch.equal(model.state_dict()[name.replace(f".{layer}.", f".{kept.index(layer)}.", 1)], value)
    teacher = load_file(Path(run.config.teacher) / "model.safetensors")
    assert torch.equal(model.lm_head.weight, teacher["lm_head.weight"])
    assert "1 of its 6 layers removed" in (tmp_path / "first/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [0, 3, -1])
def test_there_is_no_such_round(run: Run, tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match=f"has no round {number}: it has rounds 1 to 2"):
        export_student(run, tmp_path / "x", number)


class Hub:
    """A hub that writes down what it is asked."""

    def __init__(self, refuses: bool = False) -> None:
        self.calls: list[Any] = []
        self.refuses = refuses

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        if self.refuses:
            raise Exception("no\nroute")
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_an_upload_is_private_and_holds_the_card(run: Run) -> None:
    hub: Any = Hub()
    assert push(run.student_folder, "me/short", hub) == "https://hub.test/me/short"
    assert hub.calls[0] == ("me/short", {"private": True, "exist_ok": True})
    assert hub.calls[1][0] == "me/short" and {"README.md", "config.json", "model.safetensors"} <= set(hub.calls[1][1])


def test_a_failed_upload_says_where_the_checkpoint_is(run: Run) -> None:
    hub: Any = Hub(refuses=True)
    with pytest.raises(RunError, match=r"--push me/short: nothing was uploaded \(no route\)") as caught:
        push(run.student_folder, "me/short", hub)
    assert str(run.student_folder) in str(caught.value.hint)
