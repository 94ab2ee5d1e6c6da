"""One round of training: steps that are equal whatever they are cut to, steps that go wrong, the teacher's cache."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerpeel.config.distill import DistillConfig, Packing
from layerpeel.config.fields import TextConfig
from layerpeel.data.batches import load_rows
from layerpeel.errors import RunError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.progress import print_once
from layerpeel.training.forward import FINAL, run_both
from layerpeel.training.gradients import StepGradients
from layerpeel.training.optimizers import ScheduledOptimizers
from layerpeel.training.result import Log, TrainingResult
from layerpeel.training.rounds import train_student
from layerpeel.training.state import WEIGHT, TrainingState
from layerpeel.training.state_files import is_undamaged
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache
from tests.families import RECURRENT, save_texts, tiny_ids, tiny_model, tiny_texts, tiny_tokenizer


def write_text(path: Path) -> Path:
    """Forty documents of 3 to 30 tokens."""
    return save_texts(path, tiny_texts(3 + 11 * line % 28 for line in range(40)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


def train(text: Path, steps: int = 6, family: str = "llama", **options: Any) -> tuple[Student, TrainingResult]:
    """Trains a student without layers 2 and 4 (or `removed`) on unpacked documents, about eight of them a step."""
    removed, teacher = options.pop("removed", [2, 4]), options.pop("teacher", None) or tiny_model(family)
    call = {name: options.pop(name) for name in ("cache", "log", "state", "storage") if name in options}
    fields = {
        "text": str(text),
        "sequence_length": 24,
        "packing": "none",
        "tokens_per_step": 128,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "train": "neighbours",
        **options,
    }
    config = DistillConfig(**fields)
    assert config.tokens_per_step != "auto"
    config.tokens_per_round = steps * config.tokens_per_step
    student = Student(teacher)
    student.remove(removed)
    return student, train_student(student, tiny_tokenizer(), config, **call)


def same(one: Student, other: Student, tolerance: float = 1e-5) -> None:
    weights, others = one.trained_state(), other.trained_state()
    assert weights.keys() == others.keys() and weights
    for name, value in weights.items():
        assert (value - others[name]).norm() <= tolerance * value.norm() + 1e-9, name


PACKINGS: list[Packing] = ["wrapped", "bfd", "none"]
PAPER: dict[str, Any] = {"kl": {"reduction": "sum/100"}, "hidden_mse": {"relative": False}}
OURS: dict[str, Any] = {"kl": {"weight": 1.0}, "hidden_mse": {}, "cross_entropy": {"weight": 0.1}}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("losses", [OURS, PAPER], ids=["ours", "the paper's"])
def test_a_step_is_the_same_however_it_is_cut(text: Path, losses: dict[str, Any], packing: Packing) -> None:
    one, at_once = train(text, losses=losses, packing=packing, batch_size=64)
    for batch_size in (8, 2, 1):
        other, parts = train(text, losses=losses, packing=packing, batch_size=batch_size)
        same(one, other)
        for a, b in zip(at_once.curve, parts.curve, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_round_trains_on_the_real_tokens_that_were_asked_for(text: Path, packing: Packing) -> None:
    _, result = train(text, 5, packing=packing)
    assert result.steps == len(result.curve) == 5
    assert 5 * 128 <= result.tokens < 5 * 128 + 24
    shares = [point["tokens"] for point in result.curve]
    assert all(abs(tokens - 128 * step) <= 12 + 4 for step, tokens in enumerate(shares, start=1))


def test_a_round_says_how_full_its_rows_are(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_once.cache_clear()
    for packing in PACKINGS:
        train(text, 5, packing=packing)
    said = capsys.readouterr().err
    assert "5 steps of 128 tokens: rows 100 % full" in said
    full = [int(percent) for percent in re.findall("5 steps of 128 tokens: rows ([0-9]+) % full", said)]
    assert full == sorted(full, reverse=True) and len(full) == 3


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_train_on_wrapped_rows(text: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"train": "all", "learning_rate": 1e-3, "removed": [3, 4]}
    student, result = train(text, 2, family=family, packing="wrapped", **options)
    assert result.steps == 2 and result.tokens == 264  # 11 rows of 24
    assert all(math.isfinite(point["loss"]) and point["gradient_norm"] > 0 for point in result.curve)
    assert "cannot keep documents" not in capsys.readouterr().err
    assert all(value.isfinite().all() for value in student.trained_state().values())


def test_recomputing_activations_changes_nothing(text: Path) -> None:
    (one, a), (other, b) = train(text), train(text, activation_checkpointing=True)
    same(one, other)
    assert a.curve[-1]["loss"] == pytest.approx(b.curve[-1]["loss"], rel=1e-5)


def test_training_only_changes_what_was_named(text: Path) -> None:
    student, result = train(text, train_norm=True, train_head=True)
    assert result.layers == [1, 3, 5]
    assert {"model.norm.weight", "lm_head.weight"} < student.trained
    teacher = dict(student.teacher.model.named_parameters())
    parameters = student.parameters()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, teacher[name]) == (name not in student.trained), name
        assert not parameter.requires_grad and parameter.grad is None
    assert result.parameters == sum(parameters[name].numel() for name in student.trained)


def test_balance_and_everything_train_without_fault(text: Path) -> None:
    student, result = train(text, balance_losses=True, train="everything")
    assert student.trains_embeddings and result.curve[-1]["loss"] < result.curve[0]["loss"]


class Poison:
    """Makes a layer of the teacher give NaN in some of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
        self.calls, run = 0, LayerwiseModel.norm

        def norm(layerwise: LayerwiseModel, hidden: Tensor) -> Tensor:
            self.calls += torch.is_grad_enabled()
            return run(layerwise, hidden) * (math.nan if torch.is_grad_enabled() and self.calls in bad else 1.0)

        monkeypatch.setattr(LayerwiseModel, "norm", norm)


def test_a_bad_step_is_skipped_and_counted(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, {3})
    student, result = train(text)
    assert (result.skipped, result.restarts, result.steps) == (1, 0, 6)
    assert [point["skipped"] for point in result.curve] == [0, 0, 1, 0, 0, 0]
    assert all(value.isfinite().all() for value in student.trained_state().values())
    assert math.isfinite(result.summary().first_loss or math.nan)


def test_too_many_bad_steps_begin_the_round_again_with_half_the_rate(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Poison(monkeypatch, {2, 3, 4})
    student, result = train(text, max_skipped_steps=2)
    assert (result.skipped, result.restarts, result.steps) == (3, 1, 6)
    assert max(point["learning_rate"] for point in result.curve) == pytest.approx(0.5e-2)
    monkeypatch.undo()
    again, _ = train(text, learning_rate=0.5e-2)
    same(student, again)  # nothing is left of the first attempt


def test_a_teacher_with_nan_in_a_weight_ends_with_a_message(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[5].mlp.up_proj.weight[0, 0] = math.nan
    monkeypatch.setattr("tests.training.test_rounds.tiny_model", lambda _: model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=r"training diverged: 12 steps had a loss or a gradient that is not finite"):
        train(text, max_skipped_steps=2)
    assert all(
        torch.equal(value, before[n]) or n.endswith("5.mlp.up_proj.weight") for n, value in model.state_dict().items()
    )


class Killed(BaseException):
    pass


def kill_at(step: int) -> Log:
    """A log that ends the process, as it were, after so many steps."""
    seen = []

    def log(point: dict[str, float]) -> None:
        seen.append(point)
        if len(seen) > step:
            raise Killed

    return log


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_options": {"fused": True}},
        {"optimizer": "Muon"},
        {"optimizer": "Adafactor"},
        {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}},
        {"optimizer": "tests.training.test_optimizer_state:KeepsAll"},
        {"average_last": 0.75, "lr_scheduler_type": "constant_with_warmup"},
        {"average_last": 0.25},
    ],
    ids=["fused AdamW", "Muon", "Adafactor", "SGD", "one with all kinds of state", "in a mean", "before a mean"],
)
def test_any_optimizer_goes_on_where_it_was_to_the_last_bit(
    text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    fields = {"train": "everything", "learning_rate": 1e-3, **options}
    uninterrupted, expected = train(text, 8, **fields)
    with pytest.raises(Killed):
        train(text, 8, state=TrainingState(tmp_path / "state", "this", 0.0), log=kill_at(4), **fields)
    resumed, result = train(text, 8, state=TrainingState(tmp_path / "state", "this", 0.0), **fields)
    same(uninterrupted, resumed, 0.0)
    assert result.curve == expected.curve


@pytest.mark.parametrize(("share", "bad"), [(0.5, set()), (0.5, {5}), (1.0, set()), (0.01, set())])
def test_the_mean_of_the_last_weights_by_hand(
    text: Path, monkeypatch: pytest.MonkeyPatch, share: float, bad: set[int]
) -> None:
    seen: list[list[Tensor]] = []
    step = ScheduledOptimizers.step

    def remembered(optimizers: ScheduledOptimizers) -> None:
        step(optimizers)
        seen.append([value.detach().double() for group in optimizers.optimizers for value in _trained(group)])

    monkeypatch.setattr(ScheduledOptimizers, "step", remembered)
    Poison(monkeypatch, bad)
    student, result = train(text, 6, average_last=share, lr_scheduler_type="constant_with_warmup")
    last = seen[-max(1, round(6 * share) - len(bad)) :]  # a step that was skipped is in no mean
    assert result.steps == 6 and len(seen) == 6 - len(bad)
    trained = {name: value for name, value in student.parameters().items() if name in student.trained}
    for index, value in enumerate(trained.values()):
        torch.testing.assert_close(value.double(), sum(each[index] for each in last) / len(last), rtol=1e-5, atol=1e-7)
    if share == 0.5:
        assert not torch.equal(seen[-1][0], next(iter(trained.values())).double())


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def test_each_optimizer_trains_in_its_way(text: Path) -> None:
    losses = [train(text, 3, optimizer=name)[1].curve[-1]["loss"] for name in ("AdamW", "Muon", "SGD")]
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("bad", "packing"),
    [(set(), "none"), ({2, 3, 4}, "none"), (set(), "bfd"), (set(), "wrapped")],
    ids=["plain", "begun again with half the rate", "bfd", "wrapped"],
)
def test_training_goes_on_where_it_was_to_the_last_bit(
    text: Path, tmp_path: Path, bad: set[int], packing: Packing
) -> None:
    def run(**options: Any) -> tuple[Student, TrainingResult]:
        return train(text, 8, max_skipped_steps=2, balance_losses=True, train_head=True, packing=packing, **options)

    with pytest.MonkeyPatch.context() as patch:
        Poison(patch, bad)
        uninterrupted, expected = run()
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch, bad)
        for step in (6, 7):
            with pytest.raises(Killed):
                run(state=TrainingState(tmp_path / "state", "this", 0.0), log=kill_at(step))
            poison.calls = 99  # what was bad is over
    seen = list[dict[str, float]]()
    other, result = run(state=TrainingState(tmp_path / "state", "this", 0.0), log=seen.append)
    same(uninterrupted, other, 0.0)
    assert result.curve == expected.curve == seen[-8:]
    assert (result.skipped, result.restarts, result.tokens) == (expected.skipped, expected.restarts, expected.tokens)
    assert TrainingState(tmp_path / "state", "another", 0.0).load() is None


def test_of_a_finished_training_the_weights_are_saved_without_the_optimizer(text: Path, tmp_path: Path) -> None:
    state = TrainingState(tmp_path / "state", "this", 600.0)
    trained, expected = train(text, state=state)
    names = [name for path in state.folder.rglob("*.safetensors") for name in load_file(path)]
    assert sorted(names) == sorted(f"{WEIGHT}{name}" for name in trained.trained)
    other, result = train(text, state=TrainingState(tmp_path / "state", "this", 600.0), log=kill_at(99))
    same(trained, other, 0.0)
    assert result.curve == expected.curve and result.tokens == expected.tokens


def test_a_training_on_other_text_does_not_go_on(text: Path, tmp_path: Path) -> None:
    state = TrainingState(tmp_path / "state", "this", 0.0)
    with pytest.raises(Killed):
        train(text, state=state, log=kill_at(4))
    save_texts(text, tiny_texts(5 + 7 * line % 23 for line in range(40)))
    other, result = train(text, state=state)
    fresh, expected = train(text)
    same(other, fresh, 0.0)
    assert result.curve == expected.curve


def test_a_damaged_state_is_not_used(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uninterrupted, _ = train(text)
    state = TrainingState(tmp_path / "state", "this", 0.0)
    with pytest.raises(Killed):
        train(text, state=state, log=kill_at(4))
    (path,) = state.folder.rglob("*.*")
    content = path.read_bytes()
    for place in (9, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        assert not is_undamaged(path)
    path.write_bytes(content)
    assert is_undamaged(path)
    path.write_bytes(content[:-100])
    other, _ = train(text, state=state)
    same(uninterrupted, other, 0.0)
    assert "damaged; the training begins again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("losses", [{"kl": {}, "hidden_mse": {}}, {"kl": {"reduction": "sum/100"}}])
def test_out_of_memory_makes_smaller_micro_batches_of_the_same_step(
    text: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[str, Any]
) -> None:
    uninterrupted, expected = train(text, losses=losses, batch_size=8)

    def small(student: Student, batch: Any, *arguments: Any, **options: Any) -> Any:
        outputs = run_both(student, batch, *arguments, **options)
        if len(batch["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs

    monkeypatch.setattr("layerpeel.training.gradients.run_both", small)
    other, result = train(text, losses=losses, batch_size=8)
    same(uninterrupted, other)
    assert result.halved == 2 and result.summary().halved == 2
    for a, b in zip(expected.curve, result.curve, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(("split", "rows"), [(False, 2), (True, 4)])
def test_where_layers_are_split_micro_batches_stay_whole_after_a_resume(split: bool, rows: int) -> None:
    cut: list[int] = []

    def accumulate(batches: Any, counts: Any, rows: int) -> dict[str, float]:
        cut.append(rows)
        return {"loss": 1.0}

    layerwise = SimpleNamespace(stand_ins={0: object()} if split else {})
    gradients: Any = SimpleNamespace(student=SimpleNamespace(layerwise=layerwise), _accumulate=accumulate)
    StepGradients.compute(gradients, [{"input_ids": torch.zeros(4, 8)}], {}, halved=1)
    assert cut == [rows]


def test_out_of_memory_with_one_row_says_what_to_do(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("layerpeel.training.gradients.run_both", never)
    with pytest.raises(RunError, match="out of memory in training, with 1 rows of 24 tokens") as error:
        train(text)
    assert "activation_checkpointing" in str(error.value.hint)


def test_what_is_left_is_what_will_be_saved(text: Path) -> None:
    student, _ = train(text, storage=torch.bfloat16)
    for value in student.trained_state().values():
        assert value.dtype is torch.float32 and torch.equal(value, value.bfloat16().float())


# The cache of the teacher's states


def test_with_the_cache_a_second_round_has_the_same_losses_to_bf16(text: Path, tmp_path: Path) -> None:
    _, plain = train(text, fresh_text=False)
    cache = TeacherCache(tmp_path / "cache", "teacher", 2**30)
    _, first = train(text, cache=cache, fresh_text=False)
    files = list(tmp_path.rglob("*.safetensors"))
    source = [TextConfig(path=str(text))]
    rows = load_rows(source, tiny_tokenizer(), sequence_length=24, packing="none", max_tokens=6 * 128)
    assert first.cached < 1 and len(files) == len({tuple(ids) for ids in rows.input_ids.tolist()})
    cache.hits = cache.misses = 0
    _, second = train(text, cache=cache, fresh_text=False)
    assert second.cached == 1 and cache.misses == 0
    for a, b, c in zip(plain.curve, first.curve, second.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert b["loss"] == c["loss"]  # the first time, too, states are those that are kept


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "document": torch.zeros_like(ids)}


def states(rows: int = 2) -> tuple[Tensor, dict[int, Tensor]]:
    return tiny_ids(rows, 5), {3: torch.randn(rows, 5, 8), FINAL: torch.randn(rows, 5, 8)}


def test_cached_states_come_back_in_bfloat16(tmp_path: Path) -> None:
    ids, hidden = states()
    cache, model = TeacherCache(tmp_path, "one", 2**20), tiny_model("llama")
    cache.keep(batch_of(ids), hidden)
    cached = TeacherCache(tmp_path, "one", 2**20).find(batch_of(ids.flip(0)), [3, FINAL], model)
    assert cached is not None
    for layer, value in hidden.items():
        assert torch.equal(cached[layer], value.flip(0).bfloat16().float())
    assert TeacherCache(tmp_path, "another", 2**20).find(batch_of(ids), [3], model) is None
    assert cache.find(batch_of(ids), [2], model) is None  # a layer that nobody asked for then
    assert cache.find(batch_of(torch.cat([ids, ids + 1])), [3], model) is None
    assert cache.find(batch_of(ids) | {"document": torch.ones_like(ids)}, [3], model) is None


def test_the_cache_keeps_to_its_limit_and_finds_damage(tmp_path: Path) -> None:
    ids, hidden = states()
    small = TeacherCache(tmp_path / "small", "one", 700)
    small.keep(batch_of(ids), hidden)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 700
    cache, model = TeacherCache(tmp_path / "large", "one", 2**20), tiny_model("llama")
    cache.keep(batch_of(ids), hidden)
    path = sorted((tmp_path / "large").rglob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert cache.find(batch_of(ids), [3, FINAL], model) is None
    path.write_bytes(content[: len(content) // 2])
    assert cache.find(batch_of(ids), [3, FINAL], model) is None
