"""Repair in closed form: exact, never worse, over the families, resumed, padded, and kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerpeel.config.distill import DistillConfig
from layerpeel.data.batches import load_rows
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError, RunError
from layerpeel.inference import front
from layerpeel.inference.ridge import Regression
from layerpeel.model.surgery import remove_layers
from layerpeel.processes.progress import print_once
from layerpeel.training.repair_states import RepairState
from layerpeel.training.repairing import repair_student
from layerpeel.training.result import RepairResult
from layerpeel.training.rounds import distill, repair
from layerpeel.training.student import Student
from tests.families import FAMILIES, UNLISTED, save_texts, tiny_model, tiny_texts, tiny_tokenizer

REMOVED = [2, 4]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


def write_text(path: Path) -> Path:
    """Forty documents of 3 to 30 tokens."""
    return save_texts(path, tiny_texts(3 + 11 * line % 28 for line in range(40)))


def config_of(text: Path, ridge: float | str = "auto", **options: Any) -> DistillConfig:
    fields = {"text": str(text), "sequence_length": 32, "packing": "none", "tokens_per_round": 0, **options}
    return DistillConfig(repair={"tokens": 100_000, "ridge": ridge}, **fields)


def repaired(
    text: Path, family: str = "llama", ridge: float | str = "auto", state: RepairState | None = None, **options: Any
) -> tuple[Student, RepairResult]:
    student = Student(tiny_model(family))
    student.remove(REMOVED)
    result = repair_student(student, tiny_tokenizer(), config_of(text, ridge, **options), REMOVED, state=state)
    assert result
    return student, result


def rows_of(text: Path) -> Rows:
    config = config_of(text)
    return load_rows(
        config.text, tiny_tokenizer(), sequence_length=32, packing=config.packing, max_tokens=100_000, seed=0
    )


def run(model: PreTrainedModel, rows: Rows, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """What enters some modules (`in NAME`) and what they give (`out NAME`), at real tokens, by plain transformers."""
    noted: dict[str, Tensor] = {}
    handles = []
    for name, path in modules.items():

        def hook(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            value = output[0] if isinstance(output, tuple) else output
            noted[f"in {name}"], noted[f"out {name}"] = given[rows.mask].double(), value[rows.mask].double()

        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(rows.input_ids.long(), attention_mask=rows.mask.long())
    for handle in handles:
        handle.remove()
    return noted


LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}
PROJECTIONS = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}


def solved(
    inputs: Tensor, lacks: Tensor, size: Tensor, bias: bool, ridge: float
) -> numpy.typing.NDArray[numpy.float64]:
    """The exact change of [weight, bias], [I, D], by least squares on all tokens with rows that hold it at zero."""
    weights = (1 / size.square().mean(-1).sqrt()).numpy()[:, None]
    rows, right = inputs.numpy() * weights, lacks.numpy() * weights
    penalty = numpy.eye(rows.shape[1] + bias) * numpy.sqrt(ridge * (rows**2).sum(0).mean())
    if bias:
        rows = numpy.hstack([rows, weights])
        penalty[-1, -1] = numpy.sqrt(ridge * (weights**2).sum())
    right = numpy.vstack([right, numpy.zeros((len(penalty), right.shape[1]))])
    return numpy.linalg.lstsq(numpy.vstack([rows, penalty]), right, rcond=None)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_projection_is_the_exact_solution_given_those_before_it(text: Path, family: str) -> None:
    ridge, layers, (attention, mlp) = 0.1, LAYERS[family], PROJECTIONS[family]
    student, result = repaired(text, family, ridge)
    teacher, shorter, rows = tiny_model(family), remove_layers(tiny_model(family), REMOVED), rows_of(text)
    kept = [0, 1, 3, 5]
    of_teacher = run(
        teacher,
        rows,
        {f"{n}": f"{layers}.{n}" for n in range(6)}
        | {f"{n} {name}": f"{layers}.{n}.{name}" for n in range(6) for name in (attention, mlp)},
    )
    # Layer 1 stands for 1 and 2, and 3 for 3 and 4: before a gap, attention's helps the MLP's.
    order = [(1, attention, 2), (1, mlp, 2), (3, attention, 4), (3, mlp, 4), (5, attention, 5), (5, mlp, 5)]
    assert [(each.layer, each.name) for each in result.projections] == [(layer, name) for layer, name, _ in order]
    for layer, name, stands_for in order:
        place = f"{layers}.{kept.index(layer)}"
        parts = {"layer": place, "projection": f"{place}.{name}", "mlp": f"{place}.{mlp}"}
        states = run(shorter, rows, parts)
        module = shorter.get_submodule(f"{place}.{name}")
        inputs, has_bias, larger = states["in projection"], module.bias is not None, 1.0
        if name == attention and layer == stands_for:
            needed = of_teacher[f"in {stands_for}"] + of_teacher[f"out {stands_for} {name}"]
            lacks = needed - states["in layer"] - states["out projection"]
        else:
            needed = of_teacher[f"out {stands_for}"]
            lacks = needed - states["out layer"]
        if name == attention and layer < stands_for:  # with the MLP's inputs beside, made as large as those
            weights = 1 / needed.square().mean(-1, keepdim=True)
            larger = float(((weights * states["in mlp"] ** 2).mean() / (weights * inputs**2).mean()).sqrt())
            inputs = torch.cat([larger * inputs, states["in mlp"]], dim=1)
        change = solved(inputs, lacks, needed, has_bias, ridge)
        matrix = larger * change[: module.weight.shape[0] if family == "gpt2" else module.weight.shape[1]]
        with torch.no_grad():
            module.weight += torch.tensor(matrix if family == "gpt2" else matrix.T).float()
            if has_bias and larger == 1.0:
                module.bias += torch.tensor(change[-1]).float()
        ours = student.layer(layer).get_submodule(name)
        torch.testing.assert_close(ours.weight, module.weight, rtol=1e-3, atol=1e-4)
        if has_bias:
            torch.testing.assert_close(ours.bias, module.bias, rtol=1e-3, atol=1e-4)


def relative_error(student: Student, rows: Rows) -> float:
    """Of the last layer's output, written another way."""
    total, teacher = 0.0, student.teacher
    for row in range(len(rows)):
        ids = rows.input_ids[row : row + 1, : int(rows.mask[row].sum())].long()
        hidden, arguments = teacher.begin(ids)
        of_student = hidden
        with torch.no_grad():
            for position, layer in enumerate(student.kept_layers.kept):
                of_student = student.layerwise.layer(position, of_student, arguments[layer])
            for layer in range(len(teacher.layers)):
                hidden = teacher.layer(layer, hidden, arguments[layer])
        total += float(((of_student - hidden).square().sum(-1) / hidden.square().sum(-1)).sum())
    return total / int(rows.mask.sum())


# Of the families of the tests, those that are not repaired, or in part; all others in both projections of each layer.
MLP_ALONE = {"mamba2", "nemotron_h", "mamba", "falcon_mamba"}
ATTENTION_ALONE = {"mixtral", "gpt_oss", "olmoe"}
NOT_AT_ALL = {"doge", "jetmoe"}


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED, "granite", "falcon", "bloom", "opt", "mamba2", "mixtral"])
def test_no_familys_error_goes_up(text: Path, family: str) -> None:
    student, result = repaired(text, family)
    assert not result.unknown or family in ATTENTION_ALONE
    changed = [each for each in result.projections if each.ridge is not None]
    assert changed and all(each.after <= each.before for each in result.projections)
    places = [(each.layer, each.name) for each in result.projections]
    assert len(set(places)) == len(places) and {layer for layer, _ in places} >= {5}
    if family in ATTENTION_ALONE or family in MLP_ALONE:
        assert len(places) == (1 if family in ATTENTION_ALONE else 3)
    else:  # both of the last layer; before the two gaps the MLP's, and where it helps attention's
        assert 4 <= len(places) <= 6
    if family not in ATTENTION_ALONE:
        before = Student(tiny_model(family))
        before.remove(REMOVED)
        rows = rows_of(text)
        after = relative_error(student, rows)
        assert after < relative_error(before, rows)
        assert result.projections[-1].after == pytest.approx(after, rel=0.02)


def same_weights(one: Student, other: Student, tolerance: float = 0.0) -> None:
    weights, others = one.trained_state(), other.trained_state()
    assert weights.keys() == others.keys() and weights
    for name, value in weights.items():
        assert (value - others[name]).norm() <= tolerance * value.norm(), name


def test_padding_changes_nothing(text: Path) -> None:
    (one, a), (other, b) = repaired(text, sequence_length=31), repaired(text, sequence_length=60)
    same_weights(one, other, 1e-3)
    assert a.tokens == b.tokens
    assert [each.ridge for each in a.projections] == [each.ridge for each in b.projections]


def test_documents_in_a_row_stay_apart(text: Path) -> None:
    (one, a), (other, b) = repaired(text, ridge=0.1), repaired(text, ridge=0.1, packing="bfd")
    same_weights(one, other, 1e-3)
    assert a.tokens == b.tokens


def test_states_in_a_file_are_those_in_memory(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory, _ = repaired(text)
    monkeypatch.setattr(front, "MEMORY_SHARE", 0.0)
    in_file, _ = repaired(text, state=RepairState(tmp_path / "state", "this repair"))
    same_weights(in_memory, in_file)
    assert not list((tmp_path / "state").glob(".states*"))


class Killed(Exception):
    pass


def test_a_resumed_repair_is_that_of_one_go(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted, expected = repaired(text)
    state = RepairState(tmp_path / "state", "this repair")
    solve, calls = Regression.solve, [0]

    def killed_at(call: int) -> Any:
        def counted(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise Killed
            return solve(*arguments)

        return counted

    monkeypatch.setattr(Regression, "solve", killed_at(4))
    with pytest.raises(Killed):
        repaired(text, state=state)
    calls[0] = 0
    monkeypatch.setattr(Regression, "solve", killed_at(0))
    resumed, result = repaired(text, state=state)
    # Of eight (the MLP's alone, both, the MLP's again before each of two gaps; the last layer's two), three were kept.
    assert calls[0] == 5
    same_weights(uninterrupted, resumed)
    assert result.projections == expected.projections and result.tokens == expected.tokens
    again, result = repaired(text, state=state)
    assert calls[0] == 5 and result.projections == expected.projections
    same_weights(uninterrupted, again)


def test_another_repair_does_not_go_on(text: Path, tmp_path: Path) -> None:
    state = RepairState(tmp_path / "state", "this repair")
    repaired(text, state=state, ridge=3.0)
    other, _ = repaired(text, state=state, ridge=0.1)
    fresh, _ = repaired(text, ridge=0.1)
    same_weights(other, fresh)


@pytest.mark.parametrize("change", ["teacher", "text", "tokenizer", "layers", "storage"])
def test_what_was_solved_for_one_student_is_not_used_for_another(text: Path, tmp_path: Path, change: str) -> None:
    teacher, tokenizer, removed, options = tiny_model("llama"), tiny_tokenizer(), REMOVED, dict[str, Any]()
    repair(teacher, tokenizer, removed, config_of(text), folder=tmp_path / "solved")
    if change == "teacher":
        with torch.no_grad():
            teacher.model.layers[3].mlp.up_proj.weight.mul_(1.5)
    elif change == "text":
        save_texts(text, tiny_texts(5 + 7 * line % 23 for line in range(30)))
    elif change == "tokenizer":
        tokenizer.eos_token = "w5"  # which ends the documents
    elif change == "layers":
        removed = [2]
    else:
        options["storage"] = torch.bfloat16
    (fresh, _), (again, _) = (
        repair(teacher, tokenizer, removed, config_of(text), folder=folder, **options)
        for folder in (None, tmp_path / "solved")
    )
    values = again.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in fresh.state_dict().items())


def test_a_damaged_file_is_solved_anew(text: Path, tmp_path: Path) -> None:
    state = RepairState(tmp_path / "state", "this repair")
    expected, _ = repaired(text, state=state)
    for file in (tmp_path / "state").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    again, _ = repaired(text, state=state)
    same_weights(expected, again)


def test_weights_are_rounded_to_what_is_saved(text: Path) -> None:
    model, result = repair(tiny_model("llama"), tiny_tokenizer(), REMOVED, config_of(text), storage=torch.bfloat16)
    assert result.layers == [1, 3, 5]
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype is torch.float32 and torch.equal(weight, weight.bfloat16().float())


def test_the_teacher_stays_as_it_is(text: Path) -> None:
    teacher, untouched = tiny_model("llama"), tiny_model("llama").state_dict()
    repair(teacher, tiny_tokenizer(), REMOVED, config_of(text))
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())


def test_trained_weights_are_what_a_later_repair_starts_from(text: Path) -> None:
    student, _ = repaired(text)
    with torch.no_grad():
        student.layer(1).mlp.down_proj.weight.mul_(1.1)
    before = student.layer(1).mlp.down_proj.weight.clone()
    student.remove([5])
    result = repair_student(student, tiny_tokenizer(), config_of(text), [5])
    assert result and {each.layer for each in result.projections} == {3}  # from the layer before the new gap
    assert torch.equal(student.layer(1).mlp.down_proj.weight, before)


def test_the_first_layers_can_go(text: Path) -> None:
    student = Student(tiny_model("llama"))
    student.remove([0, 1])
    result = repair_student(student, tiny_tokenizer(), config_of(text), [0, 1])
    assert result and result.projections[0].layer == 2
    assert all(each.after <= each.before for each in result.projections)


def test_distill_repairs_before_it_trains(text: Path) -> None:
    def losses(**options: Any) -> tuple[float, RepairResult | None]:
        config = DistillConfig(
            text=str(text), sequence_length=32, tokens_per_round=512, batch_size=8, learning_rate=1e-6, **options
        )
        _, result = distill(tiny_model("llama"), tiny_tokenizer(), REMOVED, config)
        return result.curve[0]["loss"], result.repair

    (with_repair, done), (without, none) = losses(), losses(repair=False)
    assert done and not none and with_repair < without


def test_what_cannot_be_repaired_is_refused_or_left(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("doge")
    with pytest.raises(InputError) as error:
        repair(model, tiny_tokenizer(), [2], config_of(text))
    assert str(error.value) == (
        "DogeForCausalLM: its layers do not add the output of a projection to their hidden states, "
        "so they cannot be repaired"
    )
    assert error.value.hint == "use `distill`, or `remove`"
    print_once.cache_clear()  # another test may have had it said
    student = Student(model)
    student.remove([2])
    config = DistillConfig(text=str(text), tokens_per_round=0)
    assert repair_student(student, tiny_tokenizer(), config, [2]) is None and not student.trained
    assert "no repair in closed form" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "distill.text: expected text to repair on"),
        ({"repair": False}, "distill.repair: false, so nothing to do"),
    ],
)
def test_a_repair_of_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        repair(tiny_model("llama"), tiny_tokenizer(), [2], DistillConfig(tokens_per_round=0, **options))
    assert str(error.value) == message
    assert error.value.hint == "set distill.text and distill.repair, or use `remove`"


def test_a_single_row_is_too_little_to_choose_by(tmp_path: Path) -> None:
    _, result = repaired(save_texts(tmp_path / "one.jsonl", tiny_texts([20])))
    assert all(each.ridge is None and each.after == each.before for each in result.projections)


def test_out_of_memory_says_in_which_layer_and_what_to_do(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Regression, "solve", solve)
    with pytest.raises(RunError, match=r"out of memory in the repair of layer 1$") as caught:
        repaired(text)
    assert caught.value.hint and "device: cpu" in caught.value.hint
