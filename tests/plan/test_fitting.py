"""Choices that fit into a memory and into a time, and the messages where none do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerpeel.errors import InputError
from layerpeel.inference.requests import LogLikelihood
from layerpeel.model.building import build_model
from layerpeel.plan.choices import Choices, Scoring
from layerpeel.plan.fitting import BY_TASKS, BY_TEXT, SAVINGS, SCORINGS, Fitter, fit_memory, fit_time
from layerpeel.plan.machine import Planner
from layerpeel.plan.quality import Measure
from tests.families import save_tiny, tiny_config, tiny_model, tiny_tokenizer

ROWS = [[LogLikelihood((1,), (2,) * 9)]] * 200
TASKS = [Measure({"name": "held_out", "kind": "perplexity", "data": "none"}, ROWS)]


def choices_for(teacher: Path) -> Choices:
    return Choices(
        teacher=str(teacher),
        output="none",
        layers=6,
        target_layers=4,
        scoring=BY_TEXT[0],
        tokens_per_round=10_000,
        sequence_length=32,
        tasks=tuple(task.fields for task in TASKS),
        limit=200,
    )


@pytest.fixture
def choices(teacher: Path) -> Choices:
    return choices_for(teacher)


@pytest.fixture
def fitter(choices: Choices, speed: Callable[..., None]) -> Fitter:
    return Fitter(Planner(choices.config()), TASKS)


@pytest.mark.parametrize("minutes", [10, 60, 600])
def test_the_time_is_used_and_not_exceeded(minutes: int, choices: Choices, fitter: Fitter) -> None:
    chosen, planned = fit_time(choices, fitter, 60 * minutes)
    share = sum(planned.seconds.values()) / (60 * minutes)
    assert 0.8 < share <= 0.9
    assert fitter.plan(chosen).seconds == planned.seconds
    for part, most in {"scoring": 0.2, "evaluation": 0.1, "repair": 0.25}.items():
        assert planned.seconds.get(part, 0.0) <= most * 0.9 * 60 * minutes


def test_more_time_buys_better_rankings_repair_and_training(choices: Choices, fitter: Fitter) -> None:
    chosen = [fit_time(choices, fitter, 60 * minutes)[0] for minutes in (3, 10, 30, 100, 300)]
    places = [SCORINGS.index(each.scoring) for each in chosen]
    assert places == sorted(places, reverse=True) and places[0] > places[-1]
    for field in ("repair_tokens", "limit", "tokens_per_round"):
        values = [getattr(each, field) for each in chosen]
        assert values == sorted(values) and values[0] < values[-1]


def test_the_time_of_a_run_by_hand(choices: Choices, fitter: Fitter) -> None:
    # A round: 256 tokens once through the candidates of six layers, no repair; 2,048 of text. Training is at the end.
    with pytest.raises(InputError) as caught:
        fit_time(choices, fitter, 60)
    scoring = 256 * (16 + 6)
    evaluation = 16 * 10 * (6 + 5 + 4 + 4) * 1.2
    training = 2 * 2048 * (6 + 4)
    sampling = 4096 * 6
    # The report: prompts of 64 tokens, 32 new ones for the memory, five times (2, 32, and 8 rows of 32), four samples.
    report = (64 * (1 + 5 * (1 + 1 + 8) + 4) + 32 + 5 * (2 + 32 + 8 * 32) + 4 * 64) * (6 + 5 + 4)
    minutes = -(-1e-3 * (scoring + evaluation + training + sampling + report) / 0.9 // 60)
    assert str(caught.value) == f"--minutes 1: the least that is of use takes about {minutes:.0f} here"
    assert caught.value.hint == (
        f"give --minutes {minutes:.0f} or more, or let fewer layers go: --target-layers N, with N above 4"
    )
    chosen, _ = fit_time(choices, fitter, 60 * minutes)
    assert chosen.tokens_per_round >= 2048


def test_tasks_rank_the_layers_where_there_is_time(choices: Choices, fitter: Fitter) -> None:
    by_tasks = replace(choices, scoring=BY_TASKS[0])
    long = Fitter(fitter.planner, [replace(TASKS[0], requests=[[LogLikelihood((1,), (2,) * 99)]] * 200)])
    assert fit_time(by_tasks, long, 60 * 1000)[0].scoring == BY_TASKS[0]
    fewer, _ = fit_time(by_tasks, long, 60 * 30)
    assert fewer.scoring == BY_TASKS[0] and 50 <= fewer.limit < 200  # rows go before the tasks' say does
    assert fit_time(by_tasks, long, 60 * 4)[0].scoring.decide == "teacher_kl"


def test_a_model_in_bfloat16_stays_so_where_that_is_faster(
    choices: Choices, speed: Callable[..., None], tmp_path: Path
) -> None:
    narrow = choices_for(tmp_path / "narrow")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(narrow.teacher)
    tiny_tokenizer().save_pretrained(narrow.teacher)
    for stored, factor, dtype in [(narrow, 0.5, "bfloat16"), (narrow, 0.9, "auto"), (choices, 0.5, "auto")]:
        speed({torch.bfloat16: factor})
        chosen, _ = fit_time(stored, Fitter(Planner(stored.config()), TASKS), 3600)
        assert chosen.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_less_memory_is_paid_for_in_order(
    family: str, tmp_path: Path, speed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpeel.plan.planning.resident_bytes", lambda: 0.0)
    monkeypatch.setattr("layerpeel.plan.planning.resident_bytes", lambda: 0.0)
    choices = replace(choices_for(save_tiny(tmp_path / "teacher", family)), scoring=SCORINGS[-1])
    fitter = Fitter(Planner(choices.config()))
    fitted, planned = fit_memory(choices, fitter, 10**12)
    assert fitted == choices
    steps = []
    with pytest.raises(InputError):
        while True:
            fitted, planned = fit_memory(choices, fitter, limit := planned.peak - 1)
            assert planned.peak <= limit
            steps.append((fitted.repair_tokens, -fitted.batch_size, fitted.checkpointing, fitted.train != "all"))
    assert [repair for repair, *_ in steps][:2] == [32_768, 0]  # what takes the most goes first
    assert steps[1:] == sorted(steps[1:]) and steps[-1] == (0, -1, True, True)


def test_a_model_that_does_not_fit_is_refused(choices: Choices, fitter: Fitter) -> None:
    with pytest.raises(InputError) as caught:
        fit_memory(choices, fitter, 10**6)
    message = str(caught.value)
    assert message.startswith(f"{choices.teacher}: the smallest run of it takes ")
    assert message.endswith(" of memory, 202 kB of them for its weights, and there are 1.00 MB")
    assert caught.value.hint == (
        "name a smaller model, or start where there is more memory (--gpu-memory says how much of it a run may take); "
        "or give --text: with text that the teacher need not write, its layers can be read from disk as they run"
    )


@pytest.mark.parametrize(("processor", "step"), [("cpu", None), ("cuda", 8 * 32)])
def test_what_does_not_fit_into_memory_stays_on_the_disk(
    processor: str, step: int | None, tmp_path: Path, speed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which computes faster than disks read, a step is a whole micro-batch."""
    monkeypatch.setattr("layerpeel.plan.planning.resident_bytes", lambda: 0.0)
    monkeypatch.setitem(SAVINGS, "scoring", [{"score_memory": 2**20}])
    monkeypatch.setattr("layerpeel.inference.layerwise.LOGITS_BYTES", 2**20)
    config = tiny_config("llama", num_hidden_layers=60, intermediate_size=256)
    build_model(config, torch.float32, trust_remote_code=False).save_pretrained(tmp_path / "deep")
    tiny_tokenizer().save_pretrained(tmp_path / "deep")
    choices = replace(choices_for(tmp_path / "deep"), layers=60, target_layers=58, scoring=SCORINGS[-1])
    fitter = Fitter(Planner(choices.config()))
    fitter.planner.device = torch.device(processor)
    with pytest.raises(InputError) as caught:
        fit_memory(choices, fitter, 0)
    least = float(str(caught.value).split(" takes ")[1].split(" MB")[0]) * 1e6
    with_text = replace(choices, text="none", hold_out=10)
    assert not fit_memory(with_text, fitter, 1.01 * least)[0].stream
    fitted, planned = fit_memory(with_text, fitter, 0.9 * least)
    assert fitted.stream and fitted.tokens_per_step == step and planned.peak < 0.9 * least
    assert "from: teacher" not in fitted.text_of_config()  # which would be refused
    written = fitted.config()
    assert written.streams and written.score.weights == "stream" and written.distill.train == "neighbours"


def test_the_text_says_what_was_chosen(choices: Choices) -> None:
    spare = replace(
        choices,
        scoring=Scoring("task_quality", 512, 3),
        score_memory=2**29,
        batch_size=1,
        checkpointing=True,
        train="neighbours",
        repair_tokens=0,
        dtype="bfloat16",
        text="corpus: 'a', [b] #1",
        hold_out=64,
    )
    config = spare.config()
    assert (config.score.decide, config.score.tokens, config.score.every) == ("task_quality", 512, 3)
    assert config.score.shortlist and config.score.shortlist.keep == 4 and config.score.memory == 2**29
    distill = config.distill
    assert (distill.batch_size, distill.activation_checkpointing, distill.train) == (1, True, "neighbours")
    assert distill.repair is False and config.dtype == "bfloat16" and distill.tokens_per_round == 10_000
    (source,) = distill.text
    assert source.model_dump(include={"path", "hold_out"}) == {"path": "corpus: 'a', [b] #1", "hold_out": 64}
    lines = spare.text_of_config("of a tiny model").splitlines()
    assert lines[0] == "# of a tiny model" and all(line.count(" # ") <= 2 and len(line) <= 140 for line in lines)
    assert choices.config().has_teacher_text and choices.config().score.every == 1


@pytest.mark.parametrize(
    "name",
    [
        "models/a",
        "Org/Model-1.5B",
        "010",
        "1e4",
        "true",
        "~",
        "a: b",
        "a #b",
        "a\nteacher: b",
        "модель",
        '"',
        "01-ai/Yi",
    ],
)
def test_any_name_is_read_back(name: str, choices: Choices) -> None:
    named = replace(choices, teacher=name, output=name)
    assert named.config().teacher == name
    assert len(named.text_of_config().splitlines()) == len(choices.text_of_config().splitlines())
