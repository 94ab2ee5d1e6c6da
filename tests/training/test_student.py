"""The shared student: its loss and gradients are those of two full models with dense logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from layerpeel.config.distill import LossConfig
from layerpeel.errors import InputError
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.surgery import remove_layers, share
from layerpeel.training.forward import next_tokens, run_both
from layerpeel.training.student import Student
from layerpeel.training.trainable import parameters_to_train
from tests.families import FAMILIES, UNLISTED, tiny_ids, tiny_model

GAPS = {"middle": [3], "two": [1, 4], "start": [0], "end": [5]}


def padded_batch(lengths: Sequence[int] = (12, 7, 3)) -> dict[str, torch.Tensor]:
    ids, mask = tiny_ids(len(lengths), 12), torch.ones(len(lengths), 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "document": torch.zeros_like(ids)}
    return batch | {"labels": next_tokens(batch)}


def names_of(student: Student, layers: Sequence[int]) -> list[str]:
    return [name for name in student.parameters() if student.layer_of(name) in layers]


def dense_reference(teacher, removed, trained, batch, reduction):
    """Two whole models, dense logits, the losses written out; gives the loss and gradients by (layer, name)."""
    kept = [layer for layer in range(6) if layer not in removed]
    student = remove_layers(copy.deepcopy(teacher), removed).requires_grad_(True)
    decoder_layers = student.base_model.h if hasattr(student.base_model, "h") else student.base_model.layers
    for index, weights in trained.items():
        decoder_layers[kept.index(index)].load_state_dict(weights)
    mask, seen = batch["attention_mask"].bool(), {}
    base = {name: model.base_model for name, model in (("teacher", teacher), ("student", student))}
    lists = {name: model.h if hasattr(model, "h") else model.layers for name, model in base.items()}
    last = max(trained)
    hooks = [
        lists[name][index].register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, index in (("teacher", last), ("student", kept.index(last)))
    ]
    ask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with torch.no_grad():
        teacher_out, teacher_final = teacher(**ask).logits, teacher.base_model(**ask).last_hidden_state
    student_out, student_final = student(**ask).logits, student.base_model(**ask).last_hidden_state
    p, q = teacher_out[mask].double().softmax(-1), student_out[mask].double().softmax(-1)
    m, labels = (p + q) / 2, batch["labels"][mask]
    labelled = labels >= 0
    tokens = int(mask.sum())
    even = (p * (p / m).log()).sum() / 2 + (q * (q / m).log()).sum() / 2
    entropy = -q[labelled].log()[torch.arange(int(labelled.sum())), labels[labelled]].sum()
    on_logits = [
        (1.0, (p * (p / q).log()).sum(), tokens),
        (0.3, (q * (q / p).log()).sum(), tokens),
        (0.7, even, tokens),
        (0.2, entropy, int(labelled.sum())),
    ]
    loss = sum(w * total / (n if reduction == "token_mean" else 100 * tokens / 4096) for w, total, n in on_logits)
    for of_student, of_teacher in ((seen["student"], seen["teacher"]), (student_final, teacher_final)):
        a, b = of_student[mask].double(), of_teacher[mask].double()
        squares = (a - b).pow(2).mean(-1) / (b.pow(2).mean(-1) if reduction == "token_mean" else 1)
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        loss = loss + (0.5 * squares + 0.4 * (1 - cosines)).sum() / tokens
    loss.backward()
    for hook in hooks:
        hook.remove()
    layers = lists["student"]
    gradients = {(i, n): p.grad for i in trained for n, p in layers[kept.index(i)].named_parameters()}
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("gap", "reduction", "recompute"),
    [
        *((gap, reduction, False) for gap in GAPS for reduction in ("token_mean", "sum/100")),
        ("two", "token_mean", True),
    ],
)
@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_loss_and_gradients_are_those_of_two_models(family: str, gap: str, reduction: str, recompute: bool) -> None:
    teacher, batch, removed = tiny_model(family), padded_batch(), GAPS[gap]
    student = Student(teacher)
    student.remove(removed)
    trained = student.kept_layers.neighbours(1)
    student.add_trained(names_of(student, trained))
    for index in trained:  # so that student and teacher differ even where nothing is removed
        with torch.no_grad():
            for parameter in student.layer(index).parameters():
                parameter.mul_(1.05)
    weights = {"kl": 1.0, "reverse_kl": 0.3, "jensen_shannon": 0.7, "cross_entropy": 0.2}
    losses = LossSum(
        {name: LossConfig(weight=weight, reduction=reduction) for name, weight in weights.items()}
        | {"hidden_mse": LossConfig(weight=0.5, relative=reduction == "token_mean")}
        | {"hidden_cosine": LossConfig(weight=0.4)}
    )
    for index in trained:
        student.layer(index).requires_grad_(True)
    tokens = int(batch["attention_mask"].sum())
    labels = int((batch["labels"] >= 0).sum())
    outputs = run_both(student, batch, [max(trained)], step_tokens=tokens, step_labels=labels, recompute=recompute)
    loss, _ = losses(outputs)
    loss.backward()

    own_weights = {index: student.layer(index).state_dict() for index in trained}
    reference_loss, gradients = dense_reference(teacher, removed, own_weights, batch, reduction)
    assert loss.item() == pytest.approx(reference_loss, rel=1e-5)
    for (index, name), expected in gradients.items():
        gradient = dict(student.layer(index).named_parameters())[name].grad
        assert gradient is not None
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-9, (index, name)


@pytest.mark.parametrize("train", ["neighbours", "above"])
def test_the_hidden_loss_at_all_layers_is_that_of_two_models(train: str) -> None:
    teacher, batch = tiny_model("llama"), padded_batch()
    student = Student(teacher)
    student.remove([1, 3])
    layers = sorted({layer for name in parameters_to_train(student, train) if (layer := student.layer_of(name))})
    assert layers == [2, 4] if train == "neighbours" else layers == [2, 4, 5]
    losses = LossSum({"hidden_mse": LossConfig(layers="all", final=False, relative=False)})
    tokens = int(batch["attention_mask"].sum())
    outputs = run_both(student, batch, losses.hidden_layers(layers), step_tokens=tokens, step_labels=tokens)
    short = remove_layers(copy.deepcopy(teacher), [1, 3])
    seen: dict[str, dict[int, torch.Tensor]] = {"teacher": {}, "student": {}}
    for name, model, kept in (("teacher", teacher, range(6)), ("student", short, (0, 2, 4, 5))):
        for index, layer in zip(kept, model.model.layers, strict=True):
            layer.register_forward_hook(lambda _m, _i, out, to=seen[name], index=index: to.update({index: out}))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool()
    errors = [(seen["teacher"][i] - seen["student"][i])[mask].double().square().mean() for i in layers]
    assert losses(outputs)[0].item() == pytest.approx(float(sum(errors)) / len(errors), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_gradients_of_everything_are_those_of_two_models(family: str, tied: bool) -> None:
    teacher, batch = tiny_model(family, tie_word_embeddings=tied), padded_batch()
    student = Student(teacher)
    student.remove([2])
    student.add_trained(parameters_to_train(student, "everything"))
    parameters = student.parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.02).requires_grad_(True)
    assert student.trains_embeddings and student.shared_prefix == 0
    tokens = int(batch["attention_mask"].sum())
    loss, _ = LossSum({"kl": LossConfig()})(run_both(student, batch, [], step_tokens=tokens, step_labels=tokens))
    loss.backward()

    reference = remove_layers(copy.deepcopy(teacher), [2]).requires_grad_(True)
    reference.load_state_dict(student.model.state_dict())
    mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
    with torch.no_grad():
        wanted = teacher(ids).logits[mask].double().softmax(-1)
    log_probabilities = reference(ids).logits[mask].double().log_softmax(-1)
    ((wanted * (wanted.log() - log_probabilities)).sum() / tokens).backward()
    expected = dict(reference.named_parameters())
    assert len(expected) == len(list(parameters))
    for (name, parameter), (other, twin) in zip(student.model.named_parameters(), expected.items(), strict=True):
        assert name == other and parameter.grad is not None and twin.grad is not None
        assert (parameter.grad - twin.grad).norm() <= 1e-5 * twin.grad.norm() + 1e-9, name


def test_sharing_costs_no_weights_and_leaves_the_teacher_alone() -> None:
    teacher, ids = tiny_model("qwen2"), tiny_ids()
    before = teacher(ids).logits.detach()
    student = Student(teacher)
    assert all(a is b for a, b in zip(teacher.parameters(), student.model.parameters(), strict=True))
    student.remove([2])
    student.add_trained(names_of(student, [1, 3]))
    with torch.no_grad():
        for parameter in student.layer(3).parameters():
            parameter.add_(1.0)
    shared = {id(p) for p in teacher.parameters()}
    copies = [p for p in student.model.parameters() if id(p) not in shared]
    assert len(copies) == len(list(student.layer(1).parameters())) * 2
    assert torch.equal(teacher(ids).logits, before)
    assert teacher.config.num_hidden_layers == 6 and student.model.config.num_hidden_layers == 5


def test_sharing_keeps_tied_heads_tied() -> None:
    model = share(tiny_model("gpt2"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_shared_prefix_ends_at_the_first_gap_or_own_layer() -> None:
    student = Student(tiny_model("llama"))
    student.remove([3])
    assert student.shared_prefix == 3
    student.add_trained(names_of(student, [2]))
    assert student.shared_prefix == 2


def test_owned_weights_come_back() -> None:
    teacher = tiny_model("gpt2")
    student, again = Student(teacher), Student(teacher)
    for one in (student, again):
        one.remove([2])
    student.add_trained(names_of(student, [1, 3]))
    with torch.no_grad():
        for parameter in student.layer(3).parameters():
            parameter.mul_(1.5)
    again.load_trained(student.trained_state())
    assert torch.equal(again.model(tiny_ids()).logits, student.model(tiny_ids()).logits)
    assert again.trained == student.trained and {again.layer_of(name) for name in again.trained} == {1, 3}


def test_trainable_sets() -> None:
    student = Student(tiny_model("llama"))
    student.remove([2])

    def layers(train: str, **options: Any) -> set[int | None]:
        return {student.layer_of(name) for name in parameters_to_train(student, train, **options)}

    assert layers("neighbours") == {1, 3} and layers("neighbours", radius=2) == {0, 1, 3, 4}
    assert layers("above") == {3, 4, 5} and layers("all") == {0, 1, 3, 4, 5}
    assert set(parameters_to_train(student, "everything")) == set(student.parameters())
    assert parameters_to_train(student, r"layers\.4\.mlp\.up") == ["model.layers.4.mlp.up_proj.weight"]
    assert parameters_to_train(student, "lm_head") == ["lm_head.weight"]
    assert layers("neighbours", norm=True, head=True) == {1, 3, None}
    assert {"model.norm.weight", "lm_head.weight"} <= set(parameters_to_train(student, "all", norm=True, head=True))
    with pytest.raises(InputError, match=r"distill.train: .* selects no parameter of the student"):
        parameters_to_train(student, r"layers\.2")


def test_a_tied_head_trains_with_its_embeddings_and_shares_nothing() -> None:
    student = Student(tiny_model("gpt2"))
    student.remove([4])
    names = parameters_to_train(student, "neighbours", head=True)
    assert "transformer.wte.weight" in names
    student.add_trained(names)
    assert student.shared_prefix == 0
    assert student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight
    assert student.model.get_input_embeddings().weight is not student.teacher.model.get_input_embeddings().weight


def test_an_own_norm_or_untied_head_leaves_the_prefix_shared() -> None:
    student = Student(tiny_model("llama"))
    student.remove([4])
    student.add_trained(parameters_to_train(student, "neighbours", norm=True, head=True))
    assert student.shared_prefix == 3 and not student.trains_embeddings


def test_kl_of_equal_models_is_zero() -> None:
    student = Student(tiny_model("llama"))
    student.add_trained(names_of(student, [5]))
    outputs = run_both(student, padded_batch(), [5], step_tokens=22, step_labels=19)
    assert functional.mse_loss(outputs.student_final, outputs.teacher_final) == 0
    total, parts = LossSum({"kl": LossConfig(), "hidden_mse": LossConfig()})(outputs)
    assert total.item() == pytest.approx(0, abs=1e-6) and set(parts) == {"kl", "hidden_mse"}


def test_labels_are_the_next_real_tokens_of_the_same_document() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 4, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "document": torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]),
    }
    assert next_tokens(batch).tolist() == [[6, 7, -100, -100], [9, -100, 3, -100]]
