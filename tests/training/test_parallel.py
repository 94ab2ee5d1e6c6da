"""Two processes (gloo, on this machine) do what one does: replicated and split, whole runs, and with a fault in one."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from layerpeel.config.reading import load_config
from layerpeel.losses.base import StepOutputs
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.training.forward import run_both
from layerpeel.training.result import TrainingResult
from layerpeel.training.sharded import sharded
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student
from tests.families import save_tiny, tiny_model
from tests.launching import launch
from tests.training.test_rounds import Killed, kill_at, same, train, write_text


def train_in_two(folder: Path, *, fsdp: bool = False, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains as `train` does; gives the student's own weights, and what the training said."""
    launch("-m", "tests.training.test_parallel", str(folder), json.dumps(options), fsdp=fsdp)
    return load_file(folder / "owned.safetensors"), json.loads((folder / "result.json").read_text())


OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer_options": {"fused": True}},
    {"optimizer": "Muon"},
    {"average_last": 0.75},
]


def _resume_each(folder: Path, **options: Any) -> None:
    """What each of the processes runs: with each optimizer a training, and one that is killed and goes on."""
    for number, optimizer in enumerate(OPTIMIZERS):

        def state(number: int = number) -> TrainingState:
            return TrainingState(folder / f"state of {number}", "this training", every=0.0)

        uninterrupted, expected = train(folder / "text.jsonl", **options, **optimizer)
        with pytest.raises(Killed):
            train(folder / "text.jsonl", state=state(), log=kill_at(4), **options, **optimizer)
        resumed, result = train(folder / "text.jsonl", state=state(), **options, **optimizer)
        same(uninterrupted, resumed, 0.0)
        assert result.curve == expected.curve and len(result.curve) == options["steps"]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _worker(folder: Path, poisoned_call: int = 0, dies_after: int = 0, keeps: bool = False, **options: Any) -> None:
    """What each of the processes runs."""
    state = TrainingState(folder / "state", "this training", every=0.0)
    from layerpeel.processes.distributed import RANK
    from tests.training.test_rounds import Poison

    with pytest.MonkeyPatch.context() as patch:
        if RANK:
            Poison(patch, {poisoned_call})
        if dies_after:
            die_after(patch, dies_after)
        if os.environ["ACCELERATE_USE_FSDP"] == "true":
            _check_split_after_forward(patch)
        student, result = train(folder / "text.jsonl", state=state if keeps else None, **options)
    if not RANK:
        save_file(student.trained_state(), folder / "owned.safetensors")
        (folder / "result.json").write_text(json.dumps(asdict(result.summary()) | {"curve": result.curve}))
    torch.distributed.barrier()  # or one leaves while the other still writes, and may be aborted in gloo's threads
    torch.distributed.destroy_process_group()


def _check_split_after_forward(patch: pytest.MonkeyPatch) -> None:
    """No layer, frozen or trained, stays whole until the backward pass."""

    def checked(student: Student, *arguments: Any, **options: Any) -> StepOutputs:
        outputs = run_both(student, *arguments, **options)
        stand_ins = [*student.layerwise.stand_ins.values(), *student.teacher.stand_ins.values()]
        parameters = [parameter for layer in stand_ins for parameter in layer.parameters()]
        assert parameters and all(isinstance(parameter, DTensor) for parameter in parameters)
        return outputs

    patch.setattr("layerpeel.training.gradients.run_both", checked)


def die_after(patch: pytest.MonkeyPatch, saves: int) -> None:
    """Both processes end at once, as if killed, after so many states were saved."""
    save, left = TrainingState.save, [saves]

    def saved(*arguments: Any) -> None:
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    patch.setattr(TrainingState, "save", saved)


def same_training(student: Student, alone: TrainingResult, weights: Any, result: Any) -> None:
    assert len(result["curve"]) == len(alone.curve)
    for a, b in zip(alone.curve, result["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]
    trained = student.trained_state()
    assert trained.keys() == weights.keys()
    for name, value in trained.items():
        assert (value - weights[name]).norm() <= 1e-4 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("packing", ["wrapped", "none"])
def test_two_processes_train_the_student_of_one(tmp_path: Path, fsdp: bool, packing: str) -> None:
    text = write_text(tmp_path / "text.jsonl")
    # With 24 tokens a step, many steps have a row for one of the processes alone.
    options: dict[str, Any] = {"steps": 20, "train_norm": True, "packing": packing, "tokens_per_step": 24}
    options |= {"losses": {"kl": {"weight": 0.5}, "hidden_mse": {}, "cross_entropy": {}}}
    options |= {"average_last": 0.5, "lr_scheduler_type": "linear"}
    student, alone = train(text, **options)
    weights, result = train_in_two(tmp_path, fsdp=fsdp, batch_size=2, **options)
    same_training(student, alone, weights, result)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_that_die_go_on_to_the_same_student(tmp_path: Path, fsdp: bool) -> None:
    write_text(tmp_path / "text.jsonl")
    options: dict[str, Any] = {"steps": 8, "batch_size": 4, "train_norm": True}
    weights, uninterrupted = train_in_two(tmp_path, fsdp=fsdp, **options)
    dying = json.dumps(options | {"keeps": True, "dies_after": 5})
    launch("-m", "tests.training.test_parallel", str(tmp_path), dying, fsdp=fsdp, dies=True)
    newest = max((tmp_path / "state").glob("[0-9]*"), key=lambda folder: int(folder.name))
    assert len([*newest.iterdir()]) == 1 + fsdp  # the one before may still be there
    again, resumed = train_in_two(tmp_path, fsdp=fsdp, keeps=True, **options)
    assert resumed["curve"] == uninterrupted["curve"] and len(resumed["curve"]) == 8
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_any_optimizer_goes_on_to_the_same_student_in_two_processes(tmp_path: Path, fsdp: bool) -> None:
    write_text(tmp_path / "text.jsonl")
    options = json.dumps({"steps": 8, "batch_size": 4, "train_norm": True, "each_optimizer": True})
    launch("-m", "tests.training.test_parallel", str(tmp_path), options, fsdp=fsdp)
    assert len([*tmp_path.glob("state of *")]) == len(OPTIMIZERS)


@pytest.mark.parametrize("fault", [None, Killed], ids=["well", "with an exception"])
def test_a_student_has_its_own_layers_back(monkeypatch: pytest.MonkeyPatch, fault: type[BaseException] | None) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    student = Student(tiny_model("llama"))
    student.remove([2])
    student.add_trained([name for name in student.parameters() if student.layer_of(name) in (1, 3)])
    weights = {name: value.clone() for name, value in student.trained_state().items()}
    of_teacher = {name: value.clone() for name, value in student.teacher.model.state_dict().items()}
    layers = list(student.layerwise.layers)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with suppress(Killed), sharded(student, weights):
            of_layers = {name: p for name, p in student.parameters().items() if student.layer_of(name) is not None}
            assert all(isinstance(parameter, DTensor) for parameter in of_layers.values())
            assert not any(parameter.numel() for parameter in student.teacher.layers.parameters())
            for name in student.trained:
                of_layers[name].to_local().data.add_(1.0)  # type: ignore[operator]
            if fault:
                raise fault
    finally:
        torch.distributed.destroy_process_group()
    assert list(student.layerwise.layers) == layers
    assert not student.layerwise.stand_ins and not student.teacher.stand_ins
    for name, value in student.trained_state().items():
        assert torch.equal(value, weights[name] + (0.0 if fault else 1.0)), name
    if fault:
        assert not any(parameter.numel() for parameter in student.teacher.layers.parameters())
        return
    for name, value in student.teacher.model.state_dict().items():
        assert torch.equal(value, of_teacher[name]), name
    assert all(
        student.parameters()[name] is p
        for name, p in student.teacher.model.named_parameters()
        if name in student.parameters() and name not in student.trained
    )


@pytest.mark.slow
def test_nan_in_one_process_is_skipped_in_both(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    weights, result = train_in_two(tmp_path, steps=6, batch_size=8, poisoned_call=3)
    assert [point["skipped"] for point in result["curve"]] == [0, 0, 1, 0, 0, 0]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cheap", "fsdp", "weights"),
    [
        ("teacher_kl", False, "memory"),
        ("repaired_kl", True, "memory"),
        ("repaired_kl", False, "stream"),
        ("a race", True, "stream"),
    ],
)
def test_a_run_in_two_processes_is_the_run_of_one(tmp_path: Path, cheap: str, fsdp: bool, weights: str) -> None:
    text = write_text(tmp_path / "text.jsonl")
    config: dict[str, Any] = {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "one"),
        "stop": {"target_layers": 4},
        "score": {"shortlist": {"by": cheap, "keep": 3}, "tokens": 128},
        "tasks": [{"kind": "perplexity", "data": str(text), "limit": 9}],
        "distill": {
            "text": str(text),
            "tokens_per_round": 768,
            "sequence_length": 24,
            "tokens_per_step": 192,
            "batch_size": 4,
            "learning_rate": 1e-3,
        },
    }
    if cheap == "a race":
        config["score"] = {"decide": "teacher_kl", "race": {"confidence": 0.9}, "tokens": 512}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    alone = peel(load_config(tmp_path / "run.yaml"))
    launch(
        "-m",
        "layerpeel",
        "run",
        str(tmp_path / "run.yaml"),
        "--no-report",
        "--set",
        f"output={tmp_path / 'two'}",
        f"--set=score.weights={weights}",
        f"--set=distill.weights={weights}",
        fsdp=fsdp,
    )
    both = Run(tmp_path / "two")
    assert both.finish and alone.finish and len(both.rounds) == 2
    for a, b in zip(alone.rounds, both.rounds, strict=True):
        assert a.removed == b.removed and a.training.tokens == b.training.tokens
        assert a.aggregate == pytest.approx(b.aggregate, rel=1e-4)
        assert a.scores.importance == pytest.approx(b.scores.importance, rel=1e-3, abs=1e-6)
        assert a.scores.dropped == b.scores.dropped and bool(a.scores.dropped) == (cheap == "a race")
        if a.scores.cheap:
            assert b.scores.cheap
            assert a.scores.cheap.importance == pytest.approx(b.scores.cheap.importance, rel=1e-2, abs=1e-6)
    one, two = (AutoModelForCausalLM.from_pretrained(run.student_folder) for run in (alone, both))
    for value, other in zip(one.parameters(), two.parameters(), strict=True):
        assert (value - other).norm() <= 1e-4 * value.norm()
    assert len((tmp_path / "two/journal.jsonl").read_text().splitlines()) == 7  # each event once


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    (_resume_each if settings.pop("each_optimizer", False) else _worker)(Path(sys.argv[1]), **settings)
