"""Configs: what is read, where paths are looked for, and what is said of what will not do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerpeel.config.distill import DistillConfig, LossConfig
from layerpeel.config.fields import TeacherTextConfig
from layerpeel.config.presets import PRESETS
from layerpeel.config.reading import load_config, parse_config
from layerpeel.config.yaml_values import read_yaml
from layerpeel.data.reading import expand
from layerpeel.errors import InputError, nearest, resolve_class
from layerpeel.losses.hidden_mse import HiddenMSE
from layerpeel.losses.kl import KL
from layerpeel.losses.loss_sum import LossSum
from layerpeel.losses.registry import make_loss

ROOT = Path(__file__).parents[2]
TASK = {"kind": "perplexity", "data": "held_out.jsonl"}


def write(folder: Path, **changes: Any) -> Path:
    """A small valid config with changes, in a folder of its own."""
    raw = {"teacher": "org/model", "output": "runs/x", "stop": {"target_layers": 4}, "tasks": [TASK], **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, list(overrides))
    assert caught.value.hint
    return str(caught.value)


def test_the_design_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(
        """
teacher: some/model
output: runs/storyteller
stop: {target_layers: 12, min_quality: 0.8}
score:
  decide: task_quality
  shortlist: {by: teacher_kl, keep: 6}
  protect: {first: 1, last: 1}
tasks:
  - {name: next_en, kind: choice, data: a.jsonl, limit: 200}
  - {name: mmlu, kind: harness, task: mmlu, num_fewshot: 5}
distill:
  text: [a.txt, b.jsonl]
  tokens_per_round: 400_000
  sequence_length: 256
  batch_size: 16
  train: above
  radius: 1
  losses: {kl: {weight: 1.0}, hidden_mse: {weight: 1.0}}
  learning_rate: 1.0e-4
seed: 0
"""
    )
    config = load_config(path)
    assert config.distill.tokens_per_round == 400_000
    assert config.distill.learning_rate == 1e-4
    assert config.score.shortlist is not None and config.score.shortlist.keep == 6
    assert [text.path for text in config.distill.text] == ["a.txt", "b.jsonl"]
    assert config.tasks[1].model_extra == {"task": "mmlu", "num_fewshot": 5}
    assert config.output == Path("runs/storyteller")


def test_storyteller_config_finds_its_kit(kit: Path) -> None:
    config = load_config(ROOT / "configs" / "storyteller.yaml")
    assert Path(config.teacher) == Path(os.path.normpath(kit / "models" / "storyteller-18"))
    for task in config.tasks:
        assert task.model_extra is not None and Path(task.model_extra["data"]).is_absolute()
    assert all(Path(text.path).is_file() for text in config.distill.text)


def test_overrides_are_yaml(tmp_path: Path) -> None:
    overrides = [
        "stop.target_layers=24",
        "score.shortlist={by: block_influence, keep: 3}",
        "distill.losses.kl.weight=2",
    ]
    config = load_config(write(tmp_path, distill={"tokens_per_round": 0, "losses": {"kl": {}}}), overrides)
    assert config.stop.target_layers == 24
    assert config.score.shortlist is not None and config.score.shortlist.by == "block_influence"
    assert config.distill.losses["kl"].weight == 2


@pytest.mark.parametrize(
    ("written", "count"), [("2.5B", 2_500_000_000), ("300M", 300_000_000), ("40k", 40_000), (7, 7)]
)
def test_sizes_in_words(tmp_path: Path, written: str | int, count: int) -> None:
    assert load_config(write(tmp_path, stop={"max_params": written})).stop.max_params == count


def test_the_teacher_may_write_the_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    sources = ["a.txt", {"from": "teacher", "tokens": "50M", "prompts": "p.jsonl", "weight": 2}]
    config = load_config(write(tmp_path, distill={"text": sources}, score={"text": {"from": "teacher"}}))
    _, source = config.distill.text
    assert isinstance(source, TeacherTextConfig) and config.has_teacher_text
    assert (source.tokens, source.temperature, source.top_p, source.weight) == (50_000_000, 1.0, 1.0, 2.0)
    prompts = str(tmp_path / "p.jsonl")
    assert {place: text.path for place, text in config.files_of_text().items()} == {
        "distill.text.0": "a.txt",
        "distill.text.1.prompts": prompts,
    }
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(again) == config


@pytest.mark.parametrize("text", ["a.txt", {"path": "a.txt"}, ["a.txt"], [{"path": "a.txt"}]])
def test_text_may_be_one_or_several(tmp_path: Path, text: Any) -> None:
    config = load_config(write(tmp_path, distill={"text": text}, score={"text": text}))
    assert [source.path for source in config.distill.text] == ["a.txt"]
    assert config.score.text == config.distill.text


def test_paths_are_of_the_configs_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.txt").touch()
    (here / "only_here.txt").touch()
    (there / "held_out.jsonl").touch()
    monkeypatch.chdir(here)
    text = ["both.txt", "only_here.txt", "nowhere.txt", "*.txt"]
    config = load_config(write(there, distill={"text": text}))
    found = [source.path for source in config.distill.text]
    assert found == [str(there / "both.txt"), str(here / "only_here.txt"), "nowhere.txt", str(there / "*.txt")]
    assert config.tasks[0].model_extra == {"data": str(there / "held_out.jsonl")}
    assert config.teacher == "org/model"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop": {"target_layer": 4}}, "stop.target_layer: unknown key; did you mean 'target_layers'?"),
        ({"sede": 1}, "sede: unknown key; did you mean 'seed'?"),
        (
            {"score": {"shortlist": {"by": "teacher_kl", "kep": 1}}},
            "score.shortlist.kep: unknown key; did you mean 'keep'",
        ),
        (
            {"distill": {"text": [{"path": "a", "colum": "b"}]}},
            "distill.text.0.colum: unknown key; did you mean 'column'",
        ),
        ({"stop": {}}, "stop: expected at least one of target_layers, min_quality, max_params"),
        ({"stop": {"target_layers": 0}}, "stop.target_layers: input should be greater than or equal to 1, found 0"),
        ({"stop": {"min_quality": 2}}, "stop.min_quality: input should be less than or equal to 1, found 2"),
        ({"teacher": None}, "teacher: field required"),
        ({"tasks": [TASK, TASK]}, "tasks: expected different names, found 'perplexity' twice"),
        ({"tasks": []}, "tasks: expected at least one"),
        ({"distill": {"packing": True}}, "distill.packing: expected wrapped, bfd or none; true is now bfd"),
        ({"distill": {"packing": False}}, "distill.packing: expected wrapped, bfd or none; false is now none"),
        ({"distill": {"packing": "ffd"}}, "distill.packing: input should be 'wrapped', 'bfd' or 'none', found 'ffd'"),
        (
            {"distill": {"accumulation": 4}},
            "distill: accumulation: set tokens_per_step instead, the real tokens of an optimizer step over all "
            "processes; micro-batches of batch_size rows follow from it",
        ),
        (
            {"distill": {"tokens_per_step": "much"}},
            "distill.tokens_per_step: expected auto, or a whole number of at least 1, found 'much'",
        ),
        (
            {"distill": {"tokens_per_step": 0}},
            "distill.tokens_per_step: expected auto, or a whole number of at least 1, found 0",
        ),
        ({"distill": {"tokens_per_round": 10}}, "distill.text: expected text to train on"),
        ({"distill": {"text": "a", "train": "layers[("}}, "distill: train: not a regular expression ("),
        ({"distill": {"text": "a", "losses": {}}}, "distill: losses: expected at least one"),
        ({"distill": {"text": 5}}, "distill.text: input should be a valid list, found 5"),
        ({"distill": {"preset": "papers"}}, "distill.preset: input should be 'paper', found 'papers'"),
        ({"distill": {"preset": ["paper"]}}, "distill.preset: input should be 'paper', found ['paper']"),
        (
            {"distill": {"text": "a", "last_pass": {}}},
            "distill: last_pass.tokens: expected how many to train on (or when: end, or half)",
        ),
        (
            {"distill": {"text": "a", "when": "half", "last_pass": {"tokens": 5}}},
            "distill: last_pass.tokens: with when: half, they are those of tokens_per_round; leave it out",
        ),
        (
            {"distill": {"text": "a", "last_pass": {"tokens": 5, "train": "layers[("}}},
            "distill: last_pass.train: not a regular expression (",
        ),
        (
            {"distill": {"tokens_per_round": 0, "last_pass": {"tokens": 5}}},
            "distill.text: expected text to train on (or no distill.last_pass)",
        ),
        ({"distill": {"text": [{}]}}, "distill.text.0.path: expected a path, or `from: teacher`; found neither"),
        ({"score": {"text": [{"from": "student"}]}}, "score.text.0.from: input should be 'teacher', found 'student'"),
        ({"distill": {"text": {"from": "teacher", "path": "a"}}}, "distill.text.0.path: unknown key"),
        (
            {"distill": {"text": {"from": "teacher", "prompt": "a"}}},
            "distill.text.0.prompt: unknown key; did you mean 'prompts'",
        ),
        (
            {"distill": {"text": {"from": "teacher", "prompts": {"path": "a", "colum": "b"}}}},
            "distill.text.0.prompts.colum: unknown key; did you mean 'column'",
        ),
        ({"distill": {"text": {"from": "teacher", "temperature": 0}}}, "distill.text.0.temperature: input should be"),
        ({"distill": {"text": {"from": "teacher", "top_p": 1.5}}}, "distill.text.0.top_p: input should be less than"),
        (
            {"tasks": [{"kind": "perplexity", "data": {"from": "teacher"}}]},
            "tasks.0: data: expected a path; a task cannot be made of text that the teacher writes",
        ),
        ({"aggregate": "median"}, "aggregate: input should be 'mean' or 'relative', found 'median'"),
    ],
)
def test_what_is_said_of_a_field(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, **changes)
    assert message(path).startswith(f"{path}: {expected}")


def test_a_preset_fills_in_what_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, distill={"text": "a", "radius": 2})
    distill = load_config(path, ["distill.preset=paper", "distill.losses={kl: {}}"]).distill
    assert (distill.train, distill.radius, distill.learning_rate, distill.warmup_steps) == ("neighbours", 2, 1e-4, 8)
    assert (distill.weight_decay, distill.max_grad_norm, distill.optimizer) == (0.05, 0.3, "AdamW")
    assert distill.losses == {"kl": LossConfig()}  # given losses take the place of all
    recipe = load_config(path, ["distill.preset=paper"]).distill
    assert LossSum(recipe.losses).losses == {"kl": KL(reduction="sum/100"), "hidden_mse": HiddenMSE(relative=False)}
    plain = load_config(path).distill
    assert plain.preset is None and set(plain.losses) == {"kl", "hidden_mse"} and plain.losses["kl"] == LossConfig()


def test_a_config_with_a_preset_says_its_values_and_means_the_same_without_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, distill={"text": "a"}), ["distill.preset=paper"])
    written = config.model_dump(mode="json")
    assert (
        written["distill"]["losses"]["kl"]["reduction"] == "sum/100" and written["distill"]["tokens_per_step"] == 16_384
    )
    del written["distill"]["preset"]
    again = parse_config(written, "again")
    assert again.distill == config.distill.model_copy(update={"preset": None})


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_one_of_a_field(name: str) -> None:
    assert (
        DistillConfig.model_validate({"preset": name}).model_dump(include={*PRESETS[name]}).keys()
        == PRESETS[name].keys()
    )
    for loss, options in PRESETS[name]["losses"].items():
        assert {
            "weight",
            *type(make_loss(loss, LossConfig())).model_fields,
        } == options.keys()  # whatever defaults become


@pytest.mark.parametrize(
    ("when", "last_pass", "rounds", "end"),
    [
        ("each_round", None, 101, None),
        ("each_round", {"tokens": 7}, 101, (7, "above", 1e-3, 3)),
        ("end", None, 0, (303, "above", 1e-3, 3)),
        ("half", None, 50, (153, "above", 1e-3, 3)),
        ("half", {"train": "all", "learning_rate": 1e-4, "warmup_steps": 0}, 50, (153, "all", 1e-4, 0)),
    ],
)
def test_tokens_in_rounds_and_at_the_end_add_up(when: str, last_pass: Any, rounds: int, end: Any) -> None:
    fields = {"train": "above", "learning_rate": 1e-3, "warmup_steps": 3, "tokens_per_round": 101}
    config = DistillConfig.model_validate({"when": when, "last_pass": last_pass} | fields)
    assert config.in_rounds().tokens_per_round == rounds
    last = config.at_end(3)
    assert (last and (last.tokens_per_round, last.train, last.learning_rate, last.warmup_steps)) == end
    if when != "each_round":
        assert last and 3 * rounds + last.tokens_per_round == 3 * 101
        assert config.at_end(0) is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stop.target_layers", "--set stop.target_layers: expected section.field=value"),
        ("seed.x=1", "--set seed.x=1: seed is not a section"),
        ("seed=[1", "--set seed=[1: the value is not YAML"),
    ],
)
def test_what_is_said_of_an_override(tmp_path: Path, override: str, expected: str) -> None:
    assert message(write(tmp_path, seed=0), override).startswith(expected)


def test_what_is_said_of_a_file(tmp_path: Path) -> None:
    assert message(tmp_path / "absent.yaml") == f"no such config: {tmp_path / 'absent.yaml'}"
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    assert message(path).startswith(f"{path}: cannot be read as YAML (")
    path.write_text("- 1")
    assert message(path) == f"{path}: expected a mapping of fields to values"


def test_nearest_and_resolve_class() -> None:
    assert nearest("chioce", ["choice", "pairs"]) == "; did you mean 'choice'? available: choice, pairs"
    assert nearest("zzz", ["choice", "pairs"]) == "; available: choice, pairs"
    table: dict[str, type[Any]] = {"path": Path}
    assert resolve_class("path", table, "thing") is Path
    assert resolve_class("collections:OrderedDict", table, "thing").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paht", "unknown thing 'paht'; did you mean 'path'? available: path"),
        ("no_such_module_x:Y", "thing 'no_such_module_x:Y' cannot be imported (No module named 'no_such_module_x')"),
        (":Y", "thing ':Y' cannot be imported (Empty module name)"),
        ("json:dumps", "thing 'json:dumps' is no class"),
    ],
)
def test_what_is_said_of_a_class(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        resolve_class(name, {"path": Path}, "thing")


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "much"])
def test_what_is_said_of_a_weight(tmp_path: Path, weight: object) -> None:
    with pytest.raises(InputError, match=r"config\.yaml: distill\.text\.0\.weight: input should be"):
        load_config(write(tmp_path, distill={"text": [{"path": "a.txt", "weight": weight}]}))


TEXT = {"text": "a.txt"}


@pytest.mark.parametrize(
    "field",
    [
        "distill.tokens_per_round",
        "distill.sequence_length",
        "distill.batch_size",
        "distill.tokens_per_step",
        "distill.warmup_steps",
        "distill.max_skipped_steps",
        "distill.text.shuffle",
        "score.tokens",
        "score.heal.steps",
        "distill.last_pass.tokens",
        "stop.max_params",
    ],
)
def test_a_count_may_be_in_thousands_wherever_one_is_asked(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, distill={"text": {"path": "a.txt"}}, stop={"target_layers": 4})
    for written, count in (("2M", 2_000_000), ("40k", 40_000), ("2.3k", 2_300), ("1e6", 1_000_000)):
        value: Any = load_config(path, [f"{field}={written}"])
        for part in field.split("."):
            value = getattr(value[0] if isinstance(value, list) else value, part)
        assert value == count
    assert "expected a whole number, found 1.0005k" in message(path, f"{field}=1.0005k")
    assert "expected a number, found True (YAML reads yes, no, on and off as booleans)" in message(path, f"{field}=yes")


def test_sizes_are_exact(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, stop={"max_params": "2.3B"})).stop.max_params == 2_300_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[no, yes]", "tasks.0.kind: input should be a valid string, found [False, True] (YAML reads yes, no, on, off"),
        ("no", "found False (YAML reads yes, no, on, off, true and false as booleans: put them in quotes)"),
        ("12", "found 12 (put a number that is text in quotes)"),
        ("010", "YAML reads 010 as an octal number: put it in quotes if it is text"),
        ("1:30", "YAML reads 1:30 to the base of 60: put it in quotes"),
    ],
)
def test_what_yaml_reads_as_something_else_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("kind: perplexity", f"kind: {text}"))
    assert expected in message(path)


def test_dates_are_text_and_exponents_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, distill=TEXT)
    settings = ["distill.optimizer_options={eps: 1e-8, betas: [9e-1, 0.95]}", "tasks=[{kind: x, name: 2024-05-01}]"]
    config = load_config(path, [*settings, "distill.learning_rate=1e-4", "distill.teacher_cache=off"])
    assert config.distill.optimizer_options == {"eps": 1e-8, "betas": [0.9, 0.95]}
    assert config.tasks[0].name == "2024-05-01" and config.distill.learning_rate == 1e-4
    assert config.distill.teacher_cache == "off"


def test_windows_paths_in_double_quotes_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('teacher: "C:\\models\\x"\n')
    with pytest.raises(InputError, match="unknown escape character") as caught:
        load_config(path)
    assert "single quotes" in str(caught.value.hint)


def test_signs_of_globs_in_the_name_of_a_folder_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a [1] *b ünd ~"
    folder.mkdir()
    for name in ("x1.txt", "x2.txt", "[q].txt"):
        (folder / name).touch()
    config = load_config(write(folder, distill={"text": ["x*.txt", "[q].txt"]}))
    pattern, exact = (source.path for source in config.distill.text)
    assert expand(pattern) == [str(folder / "x1.txt"), str(folder / "x2.txt")]
    assert expand(exact) == [str(folder / "[q].txt")]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b1.txt", "held.jsonl", "model"):
        (tmp_path / name).touch()
    changes: dict[str, Any] = {"teacher": "~/model", "output": "~/run", "distill": {"text": ["~/a.txt", "~/b*.txt"]}}
    config = load_config(write(tmp_path, **changes, tasks=[TASK | {"data": "~/held.jsonl"}]))
    assert config.output == tmp_path / "run" and config.teacher == str(tmp_path / "model")
    assert [source.path for source in config.distill.text] == [str(tmp_path / "a.txt"), str(tmp_path / "b*.txt")]
    assert config.tasks[0].model_extra == {"data": str(tmp_path / "held.jsonl")}


def test_what_is_written_counts_before_what_is_merged_however_deep() -> None:
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: &c {<<: *b, y: 3}\nd: {<<: *c, y: 4}"
    read = read_yaml(text, "unused", "unused")
    assert [read[name] for name in "bcd"] == [{"x": 2}, {"x": 2, "y": 3}, {"x": 2, "y": 4}]
    with pytest.raises(InputError, match="found the key 'x' twice"):
        read_yaml("a: &a {y: 1}\nb: {<<: *a, x: 2, x: 3}", "unused", "unused")
