"""The small world, and the teacher that ships with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from layerpeel.config.reading import load_config
from layerpeel.demo.preparing import TEACHER, prepare_demo
from layerpeel.demo.world import COUNTS, Sentence, World, held_out, make_tokenizer, write_world
from layerpeel.model.architecture import count_parameters
from layerpeel.model.loading import load_model
from layerpeel.run.loop import peel
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks


def test_the_world_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_world(tmp_path / name, documents=50, items=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jsonl"))
    assert len(files) == 8
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_training_says_no_sentence_and_no_wording_of_a_question_that_is_tested() -> None:
    rows = [row for rows in held_out().values() for row in rows]
    world = World()
    stops = {world.words[language]["stop"][0] for language in "ab"}
    questions = {str(row["context"]) for row in rows if "context" in row}
    sentences = {words for row in rows if "prompt" in row for words in sentences_of(str(row["prompt"]), stops)}
    assert len(questions) >= 300 and len(sentences) > 2000
    for prompt, target in islice(world.examples(1), 5000):
        assert prompt not in questions
        assert not sentences & {*sentences_of(prompt, stops), *sentences_of(target, stops)}


def sentences_of(text: str, stops: set[str]) -> Iterator[str]:
    """The sentences in a prompt or a target, without the command before them."""
    sentence: list[str] = []
    for word in text.split(" : ")[-1].removesuffix(" =").split():
        sentence.append(word)
        if word in stops:
            yield " ".join(sentence)
            sentence = []


def test_sentences_and_facts_by_hand() -> None:
    world = World()
    a, b = world.words["a"], world.words["b"]
    sentence = Sentence(0, 1, 2, 3, 4, 5)
    assert world.say(sentence, "a").split() == [
        a["colour"][1],
        a["creature"][0],
        a["verb"][2],
        a["colour"][4],
        a["creature"][3],
        a["in"][0],
        a["home"][5],
        a["stop"][0],
    ]
    assert world.say(sentence, "b").split() == [
        b["in"][0],
        b["home"][5],
        b["creature"][0],
        b["colour"][1],
        b["creature"][3],
        b["colour"][4],
        b["verb"][2],
        b["stop"][0],
    ]
    bare = Sentence(0, None, 2, 3, None, None)
    assert world.say(bare, "a").split() == [a["creature"][0], a["verb"][2], a["creature"][3], a["stop"][0]]
    assert world.say(bare, "b").split() == [b["creature"][0], b["creature"][3], b["verb"][2], b["stop"][0]]


def test_questions_by_hand() -> None:
    world = World()
    a = world.words["a"]
    friend = world.facts[7][3]
    example, values = world.question(7, (3, 0), "a", 0)
    assert example.prompt.split() == [
        a["ask"][0],
        a["relation"][0],
        a["relation"][3],
        a["creature"][7],
        ":",
    ]
    assert example.target.strip() == a["colour"][world.facts[friend][0]] and len(values) == COUNTS["colour"]
    other, _ = world.question(7, (3, 0), "a", 1)
    assert other.target == example.target
    assert other.prompt.split() == [
        a["creature"][7],
        a["relation"][3],
        a["relation"][0],
        a["ask"][0],
        ":",
    ]
    training, tested = world.questions(test=False), world.questions(test=True)
    assert len(set(training) | set(tested)) == len(training) + len(tested) == 24 * 12 * 2
    assert {(c, path) for c, path, _ in tested} <= {(c, path) for c, path, _ in training}


def test_answers_to_questions_are_among_four_different_choices() -> None:
    rows = held_out(items=50)["knowledge_a"]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_each_word_is_one_token_and_text_comes_back() -> None:
    world = World()
    tokenizer = make_tokenizer(world)
    for example in islice(world.examples(2), 300):
        text = "".join(example).lstrip()
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text


def test_the_shipped_files_are_those_that_were_measured() -> None:
    lines = (TEACHER / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.name for path in TEACHER.iterdir()} - {"SHA256SUMS"}
    assert files == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((TEACHER / name).read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 9e6


@pytest.mark.slow
def test_the_teacher_is_small_and_able_and_deep_for_a_reason(tmp_path: Path) -> None:
    model, tokenizer = load_model(TEACHER)
    assert model.config.model_type == "qwen2" and model.config.num_hidden_layers == 12
    assert count_parameters(model) <= 4e6
    scores = json.loads((TEACHER / "scores.json").read_text())
    assert scores["aggregate"] >= 0.85
    costs = scores["cost_of_skipping"].values()
    assert len(costs) == 12
    assert sum(layer["cost"] > max(0.01, 3 * layer["stderr"]) for layer in costs) >= 8
    tasks = make_tasks(load_config(prepare_demo(tmp_path)).tasks)
    again = evaluate(model, tokenizer, tasks)
    assert again.aggregate(again) == pytest.approx(scores["aggregate"], abs=0.01)


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    quick = ["stop.target_layers=11", "distill.tokens_per_round=5000", "distill.repair.tokens=5000"]
    config = load_config(prepare_demo(tmp_path), quick)
    for task in config.tasks:
        assert task.model_extra is not None
        task.model_extra["limit"] = 4
    run = peel(config)
    assert run.finish is not None and len(run.rounds[0].evaluation.scores) == 7
