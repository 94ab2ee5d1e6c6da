"""The KL after a repair around the gap: that of a shorter model whose neighbours of the gap were repaired."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerpeel.data.rows import Rows
from layerpeel.errors import RunError
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.front import Front
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.refitting import LayerRefit
from layerpeel.model.surgery import remove_layers
from layerpeel.training.repair import RepairWalk
from layerpeel.training.student import Student
from tests.families import VOCABULARY, tiny_model, tiny_tokenizer

CANDIDATES = [0, 2, 5]  # the first and the last of six have one neighbour


def text_rows(rows: int = 24) -> Rows:
    """Rows of 6 to 20 tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(20)[None] < torch.randint(6, 21, (rows, 1), generator=generator)
    return Rows(torch.randint(0, VOCABULARY, (rows, 20), generator=generator), mask)


def inputs_of(family: str, candidates: list[int] = CANDIDATES) -> ScoringInputs:
    layerwise = LayerwiseModel(tiny_model(family))
    return ScoringInputs(layerwise, layerwise, tiny_tokenizer(), candidates, text_rows())


@torch.no_grad()
def dense_kl(student: torch.nn.Module, teacher: torch.nn.Module, rows: Rows) -> float:
    one, other = (model(rows.input_ids).logits[rows.mask].double().log_softmax(-1) for model in (student, teacher))
    return float((other.exp() * (other - one)).sum(-1).mean())


@torch.no_grad()
def repaired_around(family: str, candidate: int, fitted: Rows, held: Tensor) -> torch.nn.Module:
    """A model without a layer; of a whole repair, the neighbours of the gap have the weights."""
    student = Student(tiny_model(family))
    student.remove([candidate])
    start = max(candidate - 1, 0)
    with Front(student.teacher, fitted, held) as front:
        RepairWalk(student, front, start, None, lambda _: torch.float32, None).walk()
    shorter = remove_layers(tiny_model(family), [candidate])
    prefix = student.layerwise.architecture.layer_prefix()
    neighbours = {student.kept_layers.position(each): each for each in (candidate - 1, candidate + 1) if 0 <= each < 6}
    for name, value in student.trained_state().items():
        for position, layer in neighbours.items():
            if name.startswith(f"{prefix}.{layer}."):
                shorter.get_parameter(name.replace(f"{prefix}.{layer}.", f"{prefix}.{position}.")).copy_(value)
    return shorter


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_is_that_of_the_shorter_model_whose_neighbours_of_the_gap_are_repaired(family: str) -> None:
    inputs = inputs_of(family)
    rows = inputs.text
    assert rows is not None
    fitted, measured = (Rows(rows.input_ids[part::2], rows.mask[part::2]) for part in (0, 1))
    held = torch.arange(12) % 8 == 7
    before = copy.deepcopy(inputs.student.model.state_dict())
    for candidate, importance in make_metric("repaired_kl").score(inputs).importance.items():
        shorter = repaired_around(family, candidate, fitted, held)
        assert importance == pytest.approx(dense_kl(shorter, tiny_model(family), measured), rel=1e-3)
    for name, value in inputs.student.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the student is left as it is


def test_a_student_is_measured_against_its_teacher_less_what_it_has_lost_already() -> None:
    inputs = inputs_of("llama", [2])
    teacher = tiny_model("llama")
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(1.5)
    alone = make_metric("repaired_kl").score(inputs).importance[2]
    inputs.teacher = LayerwiseModel(teacher)
    rows = inputs.text
    assert rows is not None
    measured = Rows(rows.input_ids[1::2], rows.mask[1::2])
    shorter = repaired_around("llama", 2, Rows(rows.input_ids[::2], rows.mask[::2]), torch.arange(12) % 8 == 7)
    expected = dense_kl(shorter, teacher, measured) - dense_kl(tiny_model("llama"), teacher, measured)
    assert make_metric("repaired_kl").score(inputs).importance[2] == pytest.approx(expected, rel=1e-3)
    assert alone != pytest.approx(expected, rel=1e-2)


def test_documents_in_a_row_stay_apart() -> None:
    apart, packed = inputs_of("llama", [2]), inputs_of("llama", [2])
    rows = apart.text
    assert rows is not None
    ids = rows.input_ids[:16]  # so that the same documents are held back
    apart.text = Rows(torch.cat([ids[:, :8], ids[:, 8:16]]), torch.ones(32, 8).bool())
    document = torch.cat([torch.zeros(16, 8), torch.ones(16, 8)], dim=1).int()
    packed.text = Rows(ids[:, :16], torch.ones(16, 16).bool(), document)
    (a,), (b,) = (make_metric("repaired_kl").score(each).importance.values() for each in (apart, packed))
    assert a == pytest.approx(b, rel=1e-3)


def test_candidates_that_were_scored_before_an_interruption_are_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_metric("repaired_kl").score(inputs_of("llama")).importance
    refit, calls = LayerRefit.refit, [0]

    def killed(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return refit(*arguments)  # type: ignore[arg-type]

    inputs = inputs_of("llama")
    inputs.answer_cache = AnswerCache(tmp_path / "answers.jsonl", "this model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerRefit, "refit", killed)
        make_metric("repaired_kl").score(inputs)
    inputs.answer_cache = AnswerCache(tmp_path / "answers.jsonl", "this model")
    assert len(inputs.answer_cache) == 1
    with monkeypatch.context() as patch:
        patch.setattr(LayerRefit, "refit", lambda *each: (calls.append(1), refit(*each))[1])
        assert make_metric("repaired_kl").score(inputs).importance == expected
    assert len(calls) - 1 == 3  # both neighbours of the second candidate, one of the last


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refit(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LayerRefit, "refit", refit)
    with pytest.raises(RunError, match="out of memory in scoring by repaired_kl") as caught:
        make_metric("repaired_kl").score(inputs_of("llama"))
    assert caught.value.hint == "score by teacher_kl, or on a larger device"
