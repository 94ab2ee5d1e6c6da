"""Whole runs of a tiny model: resumed as uninterrupted, floors, and a student that stands on its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerpeel.cli.tables import run_table
from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.inference.ridge import Regression
from layerpeel.model.loading import load_model
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation, TaskScore
from layerpeel.training.rounds import distill
from tests.families import save_texts, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run of a tiny teacher from 6 layers to 4, with training."""
    text = str(save_texts(tmp_path / "text.jsonl"))
    return {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "run"),
        "stop": {"target_layers": 4},
        "score": {"decide": "task_quality", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 64},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 5}],
        "distill": {
            "text": text,
            "tokens_per_round": 512,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "batch_size": 4,
            "train": "all",
            "learning_rate": 1e-3,
            "repair": False,
        },
    }


def config_of(settings: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(settings | changes, "test")


def numbers(run: Run) -> list[Any]:
    """What has to be the same whenever a run is repeated: all but times."""
    return [
        (
            event.removed,
            event.kept,
            event.scores.importance,
            event.evaluation,
            event.training.first_loss,
            event.training.last_loss,
            event.repair.projections if event.repair else [],
        )
        for event in run.rounds
    ]


def test_a_run_ends_at_its_target_with_a_student_that_is_the_one_measured(settings: dict[str, Any]) -> None:
    settings["distill"] |= {"tokens_per_round": 2048, "tokens_per_step": 128, "learning_rate": 2e-4}
    run = peel(config_of(settings))
    assert run.finish is not None and run.finish.reason == "target_layers"
    assert [len(event.kept) for event in run.rounds] == [5, 4]
    for event in run.rounds:
        assert event.training.last_loss < event.training.first_loss
    student, tokenizer = load_model(run.student_folder)
    again = evaluate(student, tokenizer, make_tasks(run.config.tasks))
    assert again == run.rounds[-1].evaluation


@pytest.mark.parametrize("stage", ["layerpeel.run.peeling.score_candidates", "layerpeel.run.peeling.evaluate"])
def test_resumed_is_uninterrupted(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole = peel(config_of(settings))
    stopped = config_of(settings, output=str(tmp_path / "stopped"))
    module, name = stage.rsplit(".", 1)
    run_stage, calls = getattr(sys.modules[module], name), []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 + (name == "evaluate"):  # in the second round; the teacher is evaluated, too
            raise KeyboardInterrupt
        return run_stage(*args)

    monkeypatch.setattr(stage, stops)
    with pytest.raises(KeyboardInterrupt):
        peel(stopped)
    assert len(Run(tmp_path / "stopped").rounds) == 1
    with (tmp_path / "stopped/journal.jsonl").open("a") as journal:
        journal.write('{"event": "rou')  # torn by a crash
    monkeypatch.setattr(stage, run_stage)
    resumed = peel(stopped)
    assert numbers(resumed) == numbers(whole)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run.student_folder) for run in (resumed, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert peel(stopped).events == resumed.events  # a finished run stays as it is


@pytest.mark.slow
def test_a_run_with_repair_goes_on_in_the_middle_of_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["distill"] |= {"repair": {"tokens": 600}, "learning_rate": 1e-5}
    solve, calls, last = Regression.solve, [], 0

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(Regression, "solve", counted)
    whole = peel(config_of(settings))
    assert all(each.repair for each in whole.rounds)
    stopped = config_of(settings, output=str(tmp_path / "stopped"))
    last = len(calls)  # in the second round
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        peel(stopped)
    assert len(Run(tmp_path / "stopped").rounds) == 1
    assert list((tmp_path / "stopped/rounds/.repair").glob("*.safetensors"))
    resumed = peel(stopped)
    assert numbers(resumed) == numbers(whole)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run.student_folder) for run in (resumed, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not (tmp_path / "stopped/rounds/.repair").exists()


def test_a_run_that_only_repairs(settings: dict[str, Any]) -> None:
    settings["distill"] |= {"repair": {"tokens": 600}, "tokens_per_round": 0}
    run = peel(config_of(settings))
    for each in run.rounds:
        assert each.repair and each.repair.tokens and not each.training.steps
        assert all(projection.after <= projection.before for projection in each.repair.projections)
        gap = min(layer for layer in range(6) if layer not in each.kept)
        assert min(each.repair.layers) >= min(gap, each.removed) - 1
    student, tokenizer = load_model(run.student_folder)
    assert evaluate(student, tokenizer, make_tasks(run.config.tasks)) == run.rounds[-1].evaluation


def test_the_student_loads_without_our_package(settings: dict[str, Any]) -> None:
    run = peel(config_of(settings))
    code = (
        "import sys; sys.modules['layerpeel'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(run.student_folder)!r})\n"
        f"AutoTokenizer.from_pretrained({str(run.student_folder)!r})\n"
        "print(model.config.num_hidden_layers, type(model).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "transformers.models.llama.modeling_llama"]


def test_a_floor_gives_the_last_student_above_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def worse_with_each_layer(model: Any, *_: Any) -> Evaluation:
        value = 10.0 * (7 - len(model.layers))  # qualities 1, 1/2, 1/3, 1/4
        return Evaluation({"perplexity": TaskScore(value, 0.0, 5, lower_is_better=True)})

    monkeypatch.setattr("layerpeel.run.peeling.evaluate", worse_with_each_layer)
    run = peel(config_of(settings, stop={"target_layers": 2, "min_quality": 0.4}))
    assert run.finish is not None and (run.finish.reason, run.finish.round) == ("min_quality", 1)
    assert [event.kept_quality for event in run.rounds] == [1 / 2, 1 / 3]
    student, _ = load_model(run.student_folder)
    assert student.config.num_hidden_layers == 5
    own = load_file(run.folder / "rounds/01/trained.safetensors")  # by teacher layer, of which one is gone
    names = sorted(name for name in student.state_dict() if ".layers." in name)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in zip(names, own.values(), strict=True))


def judged(monkeypatch: pytest.MonkeyPatch, *qualities: float) -> None:
    """Lets the teacher and then each student that is evaluated keep these shares of the teacher's quality."""
    left = iter(qualities)

    def evaluate_next(*_: Any) -> Evaluation:
        return Evaluation({"perplexity": TaskScore(10.0 / next(left), 0.0, 5, lower_is_better=True)})

    monkeypatch.setattr("layerpeel.run.peeling.evaluate", evaluate_next)


def saved_is_round(run: Run, number: int) -> bool:
    """Whether the checkpoint's layers are those of a round, 0 for the teacher, to the last bit."""
    layers = run.rounds[number - 1].kept if number else range(6)
    saved, teacher = load_model(run.student_folder)[0].state_dict(), load_model(run.config.teacher)[0].state_dict()
    trained = load_file(run.round_folder(number) / "trained.safetensors") if number else {}
    expected = teacher | trained

    def of_teacher(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], str(layers[int(parts[2])]), *parts[3:]]) if ".layers." in name else name

    count = load_model(run.student_folder)[0].config.num_hidden_layers
    return count == len(layers) and all(torch.equal(saved[name], expected[of_teacher(name)]) for name in saved)


@pytest.mark.parametrize("train", ["all", "neighbours"])
def test_no_last_pass_where_nothing_was_removed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    judged(monkeypatch, 1.0, 0.8)
    distill = settings["distill"] | {"train": train, "last_pass": {"tokens": 64}}
    run = peel(config_of(settings, distill=distill, stop={"target_layers": 4, "min_quality": 0.9}))
    assert run.finish is not None
    assert (run.finish.reason, run.finish.round, run.finish.last_pass) == ("min_quality", 0, None)
    assert saved_is_round(run, 0)


@pytest.mark.parametrize("changes", [{"when": "end"}, {"last_pass": {"tokens": 64, "train": "everything"}}])
def test_a_last_pass_that_ends_below_the_floor_is_not_the_result(
    settings: dict[str, Any],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judged(monkeypatch, 1.0, 0.95, 0.85)
    stop = {"target_layers": 5, "min_quality": 0.9}
    run = peel(config_of(settings, distill=settings["distill"] | changes, stop=stop))
    assert run.finish is not None
    assert (run.finish.reason, run.finish.round, run.finish.last_pass) == ("target_layers", 1, None)
    assert saved_is_round(run, 1)
    said = "the last pass went below the quality floor (85.0 % of the teacher's); the student is that of round 1, as it"
    assert said in capsys.readouterr().err
    assert [each.round for each in run.findings if said in each.message] == [1]


@pytest.mark.parametrize(
    ("qualities", "floor", "result"),
    [((0.95, 0.9, 0.8), 0.97, 0), ((0.95, 0.9, 0.8), 0.95, 1), ((0.9, 0.95, 0.8), 0.92, 2)],
)
def test_a_floor_that_is_raised_later_holds(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    qualities: tuple[float, ...],
    floor: float,
    result: int,
) -> None:
    settings["distill"]["tokens_per_round"] = 64
    judged(monkeypatch, 1.0, *qualities)
    peel(config_of(settings, stop={"target_layers": 3}))
    run = peel(config_of(settings, stop={"target_layers": 3, "min_quality": floor}), accept_changes=True)
    assert run.finish is not None
    assert (run.finish.reason, run.finish.round, run.finish.layers) == ("min_quality", result, 6 - result)
    assert saved_is_round(run, result)


@pytest.mark.parametrize("stop", ["target_layers", "max_params"])
def test_a_target_that_is_raised_later_is_where_the_result_is(
    settings: dict[str, Any], stop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["distill"]["tokens_per_round"] = 64
    judged(monkeypatch, 1.0, 0.9, 0.8, 0.7)
    first = peel(config_of(settings, stop={"target_layers": 4}))
    assert "later rounds" not in capsys.readouterr().err
    raised = {"target_layers": 5, "max_params": first.rounds[0].parameters}[stop]
    run = peel(config_of(settings, stop={stop: raised}), accept_changes=True)
    assert run.finish is not None
    assert (run.finish.reason, run.finish.round, run.finish.layers) == (stop, 1, 5)
    assert saved_is_round(run, 1) and len(run.rounds) == 2
    assert f"stop.{stop}: the student is that of round 1; later rounds went beyond it" in capsys.readouterr().err
    run = peel(config_of(settings, stop={"target_layers": 3}), accept_changes=True)  # on from the last round
    assert run.finish is not None and (run.finish.round, run.finish.layers) == (3, 3)


def test_the_table_has_the_depth_of_the_last_pass(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 1.0, 0.95, 0.8, 0.96)
    distill = settings["distill"] | {"tokens_per_round": 64, "last_pass": {"tokens": 64}}
    run = peel(config_of(settings, distill=distill, stop={"target_layers": 3, "min_quality": 0.9}))
    assert run.finish is not None and run.finish.last_pass and run.finish.reason == "min_quality"
    cells = [list(column.cells) for column in run_table(run).columns][:3]
    assert [each[-2:] for each in cells] == [["2", "last pass"], [str(run.rounds[1].removed), "-"], ["4", "5"]]


def test_text_that_only_scores_is_not_longer_than_the_model(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["teacher"] = str(save_tiny(tmp_path / "gpt2", "gpt2"))
    score = {"decide": "teacher_kl", "text": settings["distill"]["text"]}
    distill = {"sequence_length": 65, "tokens_per_round": 0}
    message = r"distill\.sequence_length: 65 is more than the 64 tokens that the teacher was made for"
    with pytest.raises(InputError, match=message):
        peel(config_of(settings, score=score, distill=distill))
    assert not Path(settings["output"]).exists()


def test_a_run_in_bfloat16_trains_and_keeps_what_was_measured(settings: dict[str, Any]) -> None:
    run = peel(config_of(settings, dtype="bfloat16", stop={"target_layers": 5}))
    assert run.rounds[0].training.last_loss < run.rounds[0].training.first_loss
    assert load_model(run.student_folder, dtype="float32")[0].dtype == torch.float32


def test_a_last_pass_trains_everything_and_is_judged(settings: dict[str, Any]) -> None:
    last_pass = {"tokens": 256, "train": "everything", "learning_rate": 1e-4}
    distill = settings["distill"] | {"train": "neighbours", "last_pass": last_pass}
    run = peel(config_of(settings, distill=distill, stop={"target_layers": 5}))
    assert run.finish is not None
    last = run.finish.last_pass
    assert [list(column.cells)[-1] for column in run_table(run).columns][:5] == [
        "last pass",
        "-",
        str(run.rounds[-1].layers),
        f"{last.parameters / 1e6:.2f} M",  # type: ignore[union-attr]
        f"{last.aggregate:.3f}",  # type: ignore[union-attr]
    ]
    assert last.training.steps == 4 and last.training.layers == list(run.rounds[-1].kept)
    student, tokenizer = load_model(run.student_folder)
    again = evaluate(student, tokenizer, make_tasks(run.config.tasks))
    assert again == last.evaluation
    teacher, _ = load_model(settings["teacher"])
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def test_curves_go_to_trackers(settings: dict[str, Any]) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = peel(config_of(settings, trackers=["tensorboard"]))
    seen = event_accumulator.EventAccumulator(str(next(run.folder.rglob("events.out.*")).parent)).Reload()
    losses = [round(point.value, 5) for point in seen.Scalars("loss")]
    files = [run.folder / "rounds" / name / "training.json" for name in ("01", "02")]
    curves = [point["loss"] for file in files for point in json.loads(file.read_text())["curve"]]
    assert losses == [pytest.approx(loss, abs=1e-5) for loss in curves]
    assert [point.value for point in seen.Scalars("layers")] == [5, 4]
    assert len({point.step for point in seen.Scalars("loss")} | {p.step for p in seen.Scalars("layers")}) == 18


def test_a_tracker_that_is_not_installed_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerpeel.run.preflight.find_spec", lambda name: None)
    with pytest.raises(InputError, match="trackers: wandb is not installed"):
        peel(config_of(settings, trackers=["wandb"]))


def test_layers_that_the_config_fixes_stay_with_the_reason_said_once(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["teacher"] = str(save_tiny(tmp_path / "jamba", "jamba"))
    settings["score"] = {"decide": "block_influence", "tokens": 64, "protect": {"first": 0, "last": 0}}
    settings["distill"]["tokens_per_round"] = 0
    run = peel(config_of(settings, stop={"target_layers": 1}))
    assert run.finish is not None
    assert run.rounds[0].removed in (0, 3, 5) and set(run.rounds[0].scores.importance) == {0, 3, 5}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("layers 1, 2, 4 stay: without one, layer 2 would be loaded with other modules") == 1
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    assert len(student.model.layers) == run.finish.layers < 6


def test_another_config_is_refused_and_the_run_left_alone(settings: dict[str, Any]) -> None:
    run = peel(config_of(settings))
    before = run.journal.read_bytes()
    with pytest.raises(InputError, match=r"holds another run: seed is 0 there and 1 in this config"):
        peel(config_of(settings, seed=1))
    assert run.journal.read_bytes() == before


def test_folders_that_hold_something_else_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty, and what it holds is no run"):
        peel(config_of(settings))
    with pytest.raises(InputError, match=r"holds no run: there is no journal\.jsonl"):
        Run(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": {"target_layers": 6}}, "stop.target_layers: 6 is not below the teacher's depth of 6 layers"),
        ({"stop": {"target_layers": 1}}, "1 cannot be reached: 2 of 6 layers are protected"),
        ({"score": {"protect": {"first": 6}}}, "all 6 layers are protected"),
        ({"score": {"protect": {"layers": [6]}}}, "there is no layer 6"),
        ({"score": {"decide": "teacher_lk"}}, r"unknown metric 'teacher_lk'; did you mean 'teacher_kl'\?"),
        ({"teacher": "./nowhere"}, "no such model: ./nowhere"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_messages_before_any_work(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        peel(config_of(settings, **changes))
    if "device" not in changes:
        assert not Path(settings["output"]).exists()


def test_the_teacher_stays_as_it_was_and_frozen_layers_have_no_gradient(settings: dict[str, Any]) -> None:
    teacher = tiny_model("qwen2")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = config_of(settings).distill.model_copy(update={"train": "neighbours"})
    student, result = distill(teacher, tiny_tokenizer(), [2], config)
    assert result.layers == [1, 3]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    changed = [n for n, p in student.named_parameters() if not any(p is q for q in teacher.parameters())]
    assert {name.split(".")[2] for name in changed} == {"1", "2"}  # positions of layers 1 and 3
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("every", "made_in"), [(1, [1, 2, 3]), (2, [1, 1, 3]), (0, [1, 1, 1])])
def test_a_ranking_serves_as_many_rounds_as_the_config_says(
    settings: dict[str, Any], every: int, made_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"decide": "teacher_kl", "tokens": 64, "every": every}
    config = config_of(settings, score=score, stop={"target_layers": 3})
    with monkeypatch.context() as patch:
        patch.setattr("layerpeel.run.peeling.evaluate", fails_in_round_two())
        with pytest.raises(KeyboardInterrupt):
            peel(config)
    run = peel(config)  # resumed in the midst of a ranking
    rankings = [event.scores for event in run.rounds]
    assert [scores.from_round or number for number, scores in enumerate(rankings, start=1)] == made_in
    for event, scores, made in zip(run.rounds, rankings, made_in, strict=True):
        order = sorted(rankings[made - 1].importance.items(), key=lambda item: (item[1], item[0]))
        gone = {earlier.removed for earlier in run.rounds[: event.number - 1]}
        assert event.removed == next(layer for layer, _ in order if layer not in gone)
        assert (scores.layer_tokens > 0) == (scores.from_round is None)


def fails_in_round_two() -> Any:
    calls: list[int] = []

    def evaluate_twice(*arguments: Any) -> Evaluation:
        calls.append(1)
        if len(calls) == 3:  # the teacher, round 1, round 2
            raise KeyboardInterrupt
        return evaluate(*arguments)

    return evaluate_twice


def test_a_shortlist_that_is_used_up_is_made_anew(settings: dict[str, Any]) -> None:
    score = {"decide": "block_influence", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 64, "every": 0}
    run = peel(config_of(settings, score=score, stop={"target_layers": 3}))
    assert [event.scores.from_round for event in run.rounds] == [None, 1, None]


def test_training_at_the_end_sees_the_tokens_of_all_rounds(settings: dict[str, Any]) -> None:
    each = peel(config_of(settings))
    distill = settings["distill"] | {"when": "end"}
    run = peel(config_of(settings, distill=distill, output=f"{settings['output']}-end"))
    assert run.finish is not None and run.finish.last_pass
    assert [event.training.tokens for event in run.rounds] == [0, 0]
    last = run.finish.last_pass.training
    assert last.steps == sum(event.training.steps for event in each.rounds)
    assert last.layers == list(run.rounds[-1].kept) and last.last_loss < last.first_loss
    with pytest.raises(InputError, match=r"last_pass.tokens: with when: end, they are those of tokens_per_round"):
        config_of(settings, distill=distill | {"last_pass": {"tokens": 96}})


def test_half_at_the_end_is_half_of_the_tokens_with_options_of_its_own(settings: dict[str, Any]) -> None:
    each = peel(config_of(settings))
    last_pass = {"train": "everything", "learning_rate": 1e-4, "warmup_steps": 1}
    distill = settings["distill"] | {"when": "half", "train": "neighbours", "last_pass": last_pass}
    run = peel(config_of(settings, distill=distill, output=f"{settings['output']}-half"))
    assert run.finish is not None and run.finish.last_pass
    last = run.finish.last_pass.training
    steps = [event.training.steps for event in run.rounds]
    assert steps == [event.training.steps // 2 for event in each.rounds] and last.steps == sum(steps)
    assert last.layers == list(run.rounds[-1].kept) != run.rounds[-1].training.layers
    card = (run.student_folder / "README.md").read_text()
    assert "256 a round" in card and "parameters: everything; learning rate 0.0001." in card
