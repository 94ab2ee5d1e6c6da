"""The recipe of a round, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from layerpeel.config.distill import DistillConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.training.recipe import TrainingRecipe, autocast
from layerpeel.training.student import Student
from tests.families import tiny_model


def recipe(processes: int = 1, **fields: Any) -> TrainingRecipe:
    return TrainingRecipe(DistillConfig(**fields), processes)


def test_steps_by_hand() -> None:
    two = recipe(2, batch_size=4, tokens_per_step=240, sequence_length=10, tokens_per_round=1000)
    assert (two.step_tokens, two.steps()) == (240, 4)
    for tokens, steps in ((0, 0), (1, 1), (359, 1), (361, 2)):
        assert recipe(tokens_per_step=240, sequence_length=10, tokens_per_round=tokens).steps() == steps
    assert recipe(tokens_per_step=100, sequence_length=256).step_tokens == 256  # never less than a row


@pytest.mark.parametrize(
    ("tokens", "length", "step", "steps"),
    [
        (100_000, 512, 512, 195),  # of a row
        (150_000, 256, 512, 293),
        (400_000, 256, 1024, 391),
        (100_000, 2048, 2048, 49),  # never less than a row
        (5_000_000, 1024, 2**14, 305),
        (10**9, 2048, 2**19, 1907),
        (100, 16, 512, 1),
    ],
)
def test_a_step_that_is_not_said_fits_the_budget(tokens: int, length: int, step: int, steps: int) -> None:
    chosen = recipe(tokens_per_round=tokens, sequence_length=length)
    assert (chosen.step_tokens, chosen.steps()) == (step, steps)
    assert recipe(8, tokens_per_round=tokens, sequence_length=length).steps() == steps


def test_a_micro_batch_is_no_larger_than_a_process_has_rows() -> None:
    fields: dict[str, Any] = {"tokens_per_step": 1024, "sequence_length": 256, "batch_size": 3}
    assert recipe(**fields).micro_batch_rows == 3 and recipe(**fields).accumulates
    assert recipe(2, **fields).micro_batch_rows == 2 and not recipe(2, **fields).accumulates
    assert recipe(8, **fields).micro_batch_rows == 1
    assert recipe(8, **fields, packing="none").micro_batch_rows == 3  # documents of any length


@pytest.mark.parametrize(
    ("wanted", "keeps_apart", "packing"),
    [("bfd", True, "bfd"), ("bfd", False, "none"), ("wrapped", False, "wrapped"), ("none", True, "none")],
)
def test_documents_are_packed_as_the_model_can(
    wanted: str, keeps_apart: bool, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerwiseModel, "runs_packed", keeps_apart)
    assert recipe(packing=wanted).packing(LayerwiseModel(tiny_model("llama"))) == packing


def test_layers_are_those_whose_parameters_train() -> None:
    student = Student(tiny_model("llama"))
    student.remove([2])
    for train in ("neighbours", "above", "all"):
        chosen = recipe(train=train)
        layers = {student.layer_of(name) for name in chosen.parameters(student)}
        assert layers == set(chosen.layers(student.kept_layers) or ())
    assert recipe(train="everything").layers(student.kept_layers) is None
    assert "model.norm.weight" in recipe(train="all", train_norm=True).parameters(student)


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]

    def rates(done: int) -> list[float]:
        optimizers = recipe(warmup_steps=2).optimizers([parameter], [True], rate=2.0, steps=8, done=done)
        seen = []
        for _ in range(done, 8):
            parameter.grad = torch.ones_like(parameter)
            seen.append(optimizers.learning_rate / 2)
            optimizers.step()
            optimizers.zero_grad()
        return seen

    assert rates(0) == pytest.approx(expected) and rates(5) == pytest.approx(expected[5:])
    assert parameter.grad is None


@pytest.mark.parametrize(("kind", "after"), [("linear", [1, 0.75, 0.5, 0.25]), ("constant_with_warmup", [1] * 4)])
def test_the_rate_falls_in_a_line_or_not_at_all(kind: str, after: list[float]) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    for done in (0, 3):
        each = recipe(warmup_steps=2, lr_scheduler_type=kind)
        optimizers = each.optimizers([parameter], [True], rate=2.0, steps=6, done=done)
        seen = []
        for _ in range(done, 6):
            parameter.grad = torch.ones_like(parameter)
            seen.append(optimizers.learning_rate / 2)
            optimizers.step()
        assert seen == pytest.approx([0.0, 0.5, *after][done:])


def test_which_steps_are_averaged() -> None:
    for share, steps in ((0.0, []), (0.25, [4]), (0.5, [3, 4]), (0.01, [4]), (1.0, [1, 2, 3, 4])):
        four = recipe(average_last=share, tokens_per_step=512, tokens_per_round=4 * 512)
        assert [step for step in range(1, 5) if four.averages(step)] == steps


def test_adamw_is_made_as_torch_makes_it_with_its_fastest_kernel() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    (optimizer,) = recipe(weight_decay=0.3).optimizers([parameter], [True], rate=0.1, steps=4).optimizers
    plain = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.3, fused=True)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults == plain.defaults
    for options in ({"fused": False}, {"foreach": True}):
        chosen = recipe(optimizer_options={"betas": [0.9, 0.95], **options})
        (optimizer,) = chosen.optimizers([parameter], [True], rate=0.1, steps=4).optimizers
        assert tuple(optimizer.defaults["betas"]) == (0.9, 0.95) and not optimizer.defaults["fused"]


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest() -> None:
    student = Student(tiny_model("llama"))
    named = student.parameters()
    in_layer = [student.layer_of(name) is not None for name in named]
    chosen = recipe(optimizer="Muon")
    muon, adamw = chosen.optimizers([*named.values()], in_layer, rate=0.1, steps=4).optimizers
    names = {id(parameter): name for name, parameter in named.items()}
    of_muon, of_adamw = ({names[id(p)] for p in each.param_groups[0]["params"]} for each in (muon, adamw))
    assert type(muon).__name__ == "Muon" and type(adamw) is torch.optim.AdamW
    assert of_muon | of_adamw == set(named) and not of_muon & of_adamw
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < of_adamw
    assert {name.split(".", 3)[3] for name in of_adamw if ".layers." in name} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert muon.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw" and chosen.optimizer_name == "Muon and AdamW"
    sizes = [sum(named[name].numel() for name in each) for each in (of_muon, of_adamw)]
    assert chosen.optimizer_bytes([*named.values()], in_layer) == 4 * sizes[0] + 8 * sizes[1]


@pytest.mark.parametrize(
    ("optimizer", "options", "matrix", "vector"),
    [
        ("AdamW", {}, 8.0, 8.0),
        ("AdamW", {"amsgrad": True}, 12.0, 12.0),
        ("SGD", {}, 0.0, 0.0),
        ("SGD", {"momentum": 0.9}, 4.0, 4.0),
        ("Adafactor", {}, 0.125, 4.0),
    ],
)
def test_the_state_of_an_optimizer_is_measured(
    optimizer: str, options: dict[str, Any], matrix: float, vector: float
) -> None:
    chosen = recipe(optimizer=optimizer, optimizer_options=options)
    with torch.device("meta"):
        parameters = [torch.empty(32, 32), torch.empty(1024)]
    assert chosen.optimizer_bytes(parameters[:1], [True]) == 1024 * matrix
    assert chosen.optimizer_bytes(parameters[1:], [False]) == 1024 * vector
    assert chosen.update_bytes == 12 + 2 * matrix


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "muon"}, "unknown optimizer 'muon'; did you mean 'Muon'"),
        ({"optimizer": "torch.nn:Linear"}, "optimizer 'torch.nn:Linear' is not derived from Optimizer"),
        ({"optimizer": "LBFGS"}, "distill.optimizer: LBFGS"),
        ({"optimizer": "SparseAdam"}, "distill.optimizer: SparseAdam"),
        ({"optimizer_options": {"momentum": 0.9}}, "AdamW does not take its options .*momentum"),
        ({"optimizer_options": {"betas": [2, 3]}}, "AdamW does not take its options .*beta"),
        ({"optimizer_options": {"lr": 0.1}}, "distill.optimizer_options.lr: it has a field"),
    ],
)
def test_what_will_not_do_is_refused_before_training(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(**fields).check()


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "Muon", "SGD", "Adafactor", "Rprop", "RMSprop", "NAdam"])
def test_optimizers_of_torch_will_do(optimizer: str) -> None:
    recipe(optimizer=optimizer).check("cpu")


def test_a_model_in_fp32_runs_as_it_is() -> None:
    with autocast("cpu", torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
