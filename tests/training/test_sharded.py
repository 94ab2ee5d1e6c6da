"""Four processes (gloo, on this machine) split all layers (FSDP2): what they hold, and that they train as one does."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from layerpeel.cli.process import main
from layerpeel.config.distill import DistillConfig, LossConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import StepOutputs
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.streaming import load_streamed
from layerpeel.processes.distributed import RANK, wait_for_all
from layerpeel.training.forward import run_both
from layerpeel.training.gradients import StepGradients
from layerpeel.training.optimizers import ScheduledOptimizers
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.result import TrainingResult
from layerpeel.training.sharded import gather_without_waiting, sharded
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache
from tests.families import FAMILIES, RECURRENT, UNLISTED, save_tiny, tiny_ids, tiny_model
from tests.launching import launch
from tests.training.test_parallel import die_after
from tests.training.test_rounds import Killed, kill_at, same, train, write_text
from tests.training.test_student import names_of, padded_batch

PROCESSES, LOOKS = 4, 15
HIDDEN = {"kl": {}, "hidden_mse": {"layers": "all"}}
CASES: dict[str, dict[str, Any]] = {
    "neighbours": {"steps": 20, "tokens_per_step": 24},  # in most steps, no row is left for some of the processes
    "above": {"steps": 6, "train": "above", "losses": HIDDEN, "activation_checkpointing": True},
    "all": {"steps": 6, "train": "all", "batch_size": 1, "average_last": 0.5},
    "everything": {"steps": 3, "train": "everything"},
    "matrices": {"steps": 3, "train": r"layers\.[35]\.mlp\.down_proj"},  # beside frozen ones of their layers
    "cached": {"steps": 12, "train_norm": True},  # one process has the teacher's states of its rows, and no other
    "streamed": {"steps": 4},
}
KILLED: dict[str, Any] = {"steps": 8, "tokens_per_step": 48, "train": "above", "train_norm": True, "average_last": 0.75}


class Bytes:
    """Notes the bytes of all parameters that are alive, before each of the teacher's layers runs.

    Attributes:
        seen: as `bytes_held` gives them, in the first calls of each training.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        run_layer, student = LayerwiseModel.layer, []

        def layer(model: LayerwiseModel, position: int, *arguments: Any) -> Tensor:
            if student and model is student[0].teacher and len(self.seen) < LOOKS:
                self.seen.append(bytes_held(student[0]))
            return run_layer(model, position, *arguments)

        def noting(current: Student, *arguments: Any, **options: Any) -> StepOutputs:
            student[:] = [current]
            try:
                return run_both(current, *arguments, **options)
            finally:
                student.clear()

        monkeypatch.setattr(LayerwiseModel, "layer", layer)
        monkeypatch.setattr("layerpeel.training.gradients.run_both", noting)


def bytes_held(student: Student) -> tuple[int, int]:
    """Bytes of the parameters alive in this process that can be split: of frozen and of trained ones."""
    not_split = {id(p) for p in student.teacher.norm_module.parameters()}
    not_split |= {id(p) for name, p in student.parameters().items() if student.layer_of(name) is None and p.numel()}
    sizes: dict[int, tuple[int, bool]] = {}
    for parameter in gc.get_objects():
        if isinstance(parameter, Tensor) and isinstance(parameter, nn.Parameter) and id(parameter) not in not_split:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
            if not local.is_meta:
                storage = local.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes(), parameter.requires_grad
    frozen = sum(size for size, trains in sizes.values() if not trains)
    return frozen, sum(size for size, trains in sizes.values() if trains)


def expected_bytes(student: Student) -> tuple[int, int]:
    """What frozen layers, embeddings and heads of both take together, and what trains in layers, in fp32."""
    of_layers = {n: p.numel() * 4 for n, p in student.parameters().items() if student.layer_of(n) is not None}
    changed = {name: size for name, size in of_layers.items() if student.layer_of(name) in student.changed_layers}
    trained = sum(size for name, size in changed.items() if name in student.trained)
    frozen = sum(p.numel() * 4 for p in student.teacher.layers.parameters()) + sum(changed.values()) - trained
    teacher = student.teacher.model
    matrices = {teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight}
    return frozen + sum(matrix.numel() * 4 for matrix in matrices), trained


def run_case(name: str, folder: Path, *, several: bool) -> tuple[Student, dict[str, Any]]:
    """Trains as a case says, in one process or as one of several."""
    options = dict(CASES[name])
    if name == "cached":
        options["cache"] = TeacherCache(folder / f"{several}-{RANK}", "teacher", 0 if RANK else 2**20)
    if name == "streamed" and several:
        files, _ = load_streamed(folder / "teacher", device="cpu", dtype="float32")
        options["teacher"] = LayerwiseModel(files.model, files.weights_loaded, files.drop_read_ahead)
    student, result = train(folder / "text.jsonl", **options)
    return student, {"curve": result.curve, "cached": result.cached}


def _worker(folder: Path) -> None:
    """What each of the processes runs."""
    with torch.no_grad():
        logits = tiny_model("llama")(tiny_ids()).logits
    gc.freeze()  # what has been imported need not be looked at
    for name in CASES:
        gc.collect()
        with pytest.MonkeyPatch.context() as patch:
            looks = Bytes(patch)
            student, result = run_case(name, folder, several=True)
        tensors = student.trained_state()
        if name == "streamed":
            assert all(parameter.is_meta for parameter in student.teacher.layers.parameters())
        else:  # all is whole again, in all processes
            with torch.no_grad():
                assert torch.equal(student.teacher.model(tiny_ids()).logits, logits)
                tensors |= {"logits": student.model(tiny_ids()).logits}
        result["bytes"] = sorted(set(looks.seen))
        (folder / f"{name}-{RANK}.json").write_text(json.dumps(result))
        if not RANK:
            save_file(tensors, folder / f"{name}.safetensors")
        del student
    _kill(folder)


def _kill(folder: Path) -> None:
    """Trains, and once more until it is killed after four steps; goes on from there in as many processes."""
    text = folder / "text.jsonl"
    uninterrupted, expected = train(text, **KILLED)
    with pytest.raises(Killed):
        train(text, state=state_for(folder, PROCESSES), log=kill_at(4), **KILLED)
    kept = state_for(folder, PROCESSES).folder
    assert sorted(path.name for path in kept.glob("*/*")) == [f"{rank}.safetensors" for rank in range(PROCESSES)]
    for copied in (2, 1, 0) if not RANK else ():
        shutil.copytree(kept, state_for(folder, copied).folder)
    wait_for_all()
    resumed, result = resume(folder, PROCESSES)
    same(uninterrupted, resumed, 0.0)
    assert result.curve == expected.curve


def state_for(folder: Path, processes: int) -> TrainingState:
    """The state that so many processes go on from."""
    return TrainingState(folder / f"state of {processes}", "this training", every=0.0)


def resume(folder: Path, processes: int) -> tuple[Student, TrainingResult]:
    """Goes on after four steps, and leaves the curve and what was trained."""
    made, step = [0], ScheduledOptimizers.step

    def counted(optimizers: ScheduledOptimizers) -> None:
        made[0] += 1
        step(optimizers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScheduledOptimizers, "step", counted)
        student, result = train(folder / "text.jsonl", state=state_for(folder, processes), **KILLED)
    assert made == [4] and result.steps == 8
    if not RANK:
        save_file(student.trained_state(), folder / f"resumed in {processes}.safetensors")
        (folder / f"resumed in {processes}.json").write_text(json.dumps(result.curve))
    return student, result


@pytest.fixture(scope="module")
def folder_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes have left that trained each case, and went on after one was killed."""
    folder = tmp_path_factory.mktemp("four")
    write_text(folder / "text.jsonl")
    save_tiny(folder / "teacher")
    launch("-m", "tests.training.test_sharded", str(folder), fsdp=True, processes=PROCESSES)
    return folder


@pytest.mark.slow
def test_what_four_processes_began_goes_on_in_four_in_two_and_in_one(folder_of_four: Path) -> None:
    launch("-m", "tests.training.test_sharded", str(folder_of_four), "resume", fsdp=True, processes=2)
    resume(folder_of_four, 1)
    curves, weights = (
        [read(folder_of_four / f"resumed in {processes}.{kind}") for processes in (4, 2, 1)]
        for kind, read in (("json", lambda path: json.loads(path.read_text())), ("safetensors", load_file))
    )
    assert [len([*state_for(folder_of_four, count).folder.glob("*/*")]) for count in (4, 2, 1, 0)] == [4, 2, 1, 4]
    for curve, trained in zip(curves[1:], weights[1:], strict=True):
        assert curve[:4] == curves[0][:4]
        for point, expected in zip(curve[4:], curves[0][4:], strict=True):
            assert point["tokens"] == expected["tokens"] and point["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert trained.keys() == weights[0].keys()
        for name, value in weights[0].items():
            assert (trained[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a file is gone", "a file is short", "another file"])
def test_a_state_with_damage_in_one_of_its_files_is_not_used(
    fault: str, folder_of_four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(state_for(folder_of_four, 0).folder, tmp_path / "state")
    (last,) = (tmp_path / "state").glob("*/3.safetensors")
    match fault:
        case "a file is gone":
            last.unlink()
        case "a file is short":
            last.write_bytes(last.read_bytes()[:-1])
        case _:
            shutil.copy(last, last.with_name("4.safetensors"))
    assert TrainingState(tmp_path / "state", "this training", every=0.0).load() is None
    assert "damaged; the training begins again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_four_processes_hold_a_quarter_each_and_train_the_student_of_one(folder_of_four: Path) -> None:
    for name in CASES:
        student, alone = run_case(name, folder_of_four, several=False)
        results = [json.loads((folder_of_four / f"{name}-{rank}.json").read_text()) for rank in range(PROCESSES)]
        quarter = [size // PROCESSES for size in expected_bytes(student)]
        for result in results:
            assert result["bytes"] == [quarter], name
            assert [point["loss"] for point in result["curve"]] == pytest.approx(
                [point["loss"] for point in alone["curve"]], rel=1e-4
            ), name
        tensors = load_file(folder_of_four / f"{name}.safetensors")
        if name != "streamed":
            with torch.no_grad():
                assert (student.model(tiny_ids()).logits - tensors.pop("logits")).abs().max() < 1e-4, name
        trained = student.trained_state()
        assert trained.keys() == tensors.keys()
        for key, value in trained.items():
            assert (value - tensors[key]).norm() <= 1e-4 * value.norm(), (name, key)
        if name == "cached":
            assert alone["cached"] and results[0]["cached"] and not results[1]["cached"]


@pytest.mark.slow
def test_two_processes_that_die_distil_from_the_disk_as_one_does_in_memory(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    fields = {
        "text": str(tmp_path / "text.jsonl"),
        "tokens_per_round": 384,
        "tokens_per_step": 96,
        "train": "neighbours",
    }
    fields |= {"sequence_length": 24, "batch_size": 2, "learning_rate": 1e-3}
    teacher = str(save_tiny(tmp_path / "teacher"))
    config = {"teacher": teacher, "output": str(tmp_path / "run"), "distill": fields}
    config |= {"tasks": [{"kind": "perplexity", "data": fields["text"]}], "stop": {"target_layers": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ("-m", "layerpeel", "distill", str(tmp_path / "run.yaml"), "--layers", "2,4", "--output")
    streamed = (*command[2:], str(tmp_path / "two"), "--set", "distill.weights=stream", "--set", "distill.save_every=0")
    launch("-m", "tests.training.test_sharded", *streamed, fsdp=True, dies=True)
    assert [path.name for path in tmp_path.glob("two*") if "training" in path.name] and not (tmp_path / "two").exists()
    launch("-m", "layerpeel", *streamed, fsdp=True)
    launch(*command, str(tmp_path / "one"), processes=1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).norm() <= 1e-3 * value.norm(), name
    assert (tmp_path / "two/README.md").exists() and not [*tmp_path.glob("two-*")]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, under FSDP2."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_no_part_of_a_layer_outlives_a_training(alone: None, tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    gc.disable()
    try:
        student, _ = train(tmp_path / "text.jsonl", steps=1, train="all")
        assert student.trained and not any(type(each) is DTensor for each in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED, *RECURRENT])
def test_a_split_model_is_that_in_memory(alone: None, family: str, dtype: torch.dtype) -> None:
    """Outputs and gradients, with a layer that trains, one that trains in part, and one that was repaired."""

    def run(student: Student) -> list[Tensor]:
        parameters = {name: student.parameters()[name] for name in trained}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        batch = padded_batch()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            outputs = run_both(student, batch, [5], step_tokens=22, step_labels=19)
            with student.heads_loaded():
                loss, _ = LossSum({"kl": LossConfig(), "hidden_mse": LossConfig()})(outputs)
            loss.backward()
        gradients = [parameter.grad for parameter in parameters.values()]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
        return [outputs.student_final, outputs.teacher_final, torch.cat([gradient.flatten() for gradient in local])]

    student = Student(tiny_model(family).to(dtype))
    student.remove([3, 4])
    partly = next(name for name in names_of(student, [2]) if student.parameters()[name].dim() > 1)
    trained = sorted({*names_of(student, [1]), partly})
    student.add_trained([*trained, *names_of(student, [5])])
    before = {name: value.clone() for name, value in student.parameters().items()}
    with sharded(student, {name: before[name] for name in trained}):
        assert not student.teacher.head_module.weight.numel() and not student.layerwise.head_module.weight.numel()
        split = run(student)
    after = student.parameters()
    assert all(torch.equal(value, after[name]) and after[name].dtype is dtype for name, value in before.items())
    for name in trained:
        after[name].data = after[name].data.float()
    whole = run(student)
    # Matrices that no product takes, as recurrent layers have them, are bfloat16 when they are gathered.
    tolerance = 0.05 if family in RECURRENT and dtype is torch.bfloat16 else 0.0
    for one, other in zip(split, whole, strict=True):
        assert one.dtype is other.dtype and (one - other).norm() <= tolerance * other.norm()


def test_no_layer_of_a_streamed_teacher_stays_where_it_was_read(alone: None, tmp_path: Path) -> None:
    files, _ = load_streamed(save_tiny(tmp_path), device="cpu")
    student = Student(LayerwiseModel(files.model, files.weights_loaded, files.drop_read_ahead))
    student.remove([3])
    with sharded(student, {}):
        assert not files._read_ahead


def test_what_one_process_has_no_gradient_of_is_summed_as_zeros(alone: None) -> None:
    """Or processes would add up different parameters, where an expert gets tokens in some of them alone."""
    student = Student(tiny_model("llama"))
    student.remove([3])
    trained = names_of(student, [2])
    student.add_trained(trained)
    with sharded(student, student.trained_state()):
        stand_in = student.layerwise.stand_ins[2]
        expert = stand_in.get_parameter("mlp.up_proj.weight")
        stand_in.mlp.forward = lambda hidden: hidden
        with student.embeddings_loaded():
            hidden, arguments = student.layerwise.begin(tiny_ids())
        student.layerwise.layer(2, hidden, arguments[2]).sum().backward()
        assert isinstance(expert.grad, DTensor) and not expert.grad.to_local().any()
        assert stand_in.get_parameter("self_attn.q_proj.weight").grad.to_local().any()


def test_a_gpu_gathers_layers_once_the_step_before_is_done(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is split is told so before each micro-batch; torch takes the events away where layers run."""
    device, events, told = torch.device("cuda", 1), list[object](), list[list[object]]()
    student = Student(tiny_model("llama"))
    student.remove([3])
    student.add_trained(names_of(student, [2]))

    def record_event() -> object:
        events.append(object())
        return events[-1]

    def on_gpu(student: Student) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "device", device)
            patch.setattr(torch.cuda, "current_stream", {device: SimpleNamespace(record_event=record_event)}.get)
            gather_without_waiting(student)

    def noting(*arguments: Any, **options: Any) -> StepOutputs:
        told.append([layer._get_fsdp_state()._state_ctx.post_optim_event for layer in stand_ins])
        for layer in stand_ins:
            layer.set_post_optim_event(None)  # which on a CPU nothing can wait for
        return run_both(*arguments, **options)

    monkeypatch.setattr("layerpeel.training.gradients.run_both", noting)
    gradients = StepGradients(student, TrainingRecipe(DistillConfig()), LossSum({"kl": LossConfig()}), [2], None)
    with sharded(student, student.trained_state()):
        stand_ins: list[Any] = [*student.teacher.stand_ins.values(), student.layerwise.stand_ins[2]]
        gradients.compute([padded_batch()], {"tokens": 44, "labels": 38}, 0)
        monkeypatch.setattr("layerpeel.training.gradients.gather_without_waiting", on_gpu)
        gradients.compute([padded_batch()] * 2, {"tokens": 44, "labels": 38}, 0)
    assert len(events) == 2 and len(stand_ins) == 7
    assert told == [[None] * 7, events[:1] * 7, events[1:] * 7]


if __name__ == "__main__":
    if sys.argv[2:] == ["resume"]:
        resume(Path(sys.argv[1]), 2)
    elif sys.argv[2:]:  # the command line, which dies when it has saved a state twice
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, 2)
            main()
    else:
        _worker(Path(sys.argv[1]))
    torch.distributed.barrier()  # or one leaves while another still writes, and may be aborted in gloo's threads
    torch.distributed.destroy_process_group()


def test_a_torch_that_averages_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fsdp.FSDPModule, "set_force_sum_reduction_for_comms")
    monkeypatch.setattr("layerpeel.training.sharded.splits_layers", lambda: True)
    with (
        pytest.raises(InputError, match=r"--use_fsdp: torch .* is too old to split layers"),
        sharded(Student(tiny_model("llama")), {}),
    ):
        pass
