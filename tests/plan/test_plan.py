"""Plans against arithmetic by hand and against what tensors really take."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel

from layerpeel.config.distill import DistillConfig, RepairConfig
from layerpeel.config.fields import TeacherTextConfig, TextConfig
from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.errors import InputError
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.work import count_work
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.model.architecture import count_parameters
from layerpeel.model.loading import load_config_of
from layerpeel.plan.exchange import exchange_times
from layerpeel.plan.machine import Planner
from layerpeel.plan.memory import TrainingMemory, repair_memory, scoring_memory
from layerpeel.plan.planning import Plan, plan_run
from layerpeel.plan.shape import Shape, empty_model, shape_of
from layerpeel.plan.speed import Speed, _decode_times, _seconds
from layerpeel.run.teacher_checks import read_for_plan
from layerpeel.training.recipe import TrainingRecipe
from tests.families import save_tiny, tiny_model

UNIT = Speed(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)  # a second a token and layer
ASKED: list[list[Request]] = [
    [LogLikelihood((1, 2, 3), (4,)), LogLikelihood((1, 2, 3), (5,))],
    [Generation((1, 2), 6, ())] * 3,
]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config(
        {
            "teacher": str(save_tiny(tmp_path / "teacher")),
            "output": "none",
            "stop": {"target_layers": 4},
            "score": {"decide": "teacher_kl", "tokens": 100},
            "tasks": [{"kind": "perplexity", "data": "none"}],
            "distill": {"text": "none", "tokens_per_round": 320, "sequence_length": 16, "tokens_per_step": 32},
        },
        "test",
    )


def plan(config: RunConfig, speed: Speed = UNIT, **options: Any) -> Plan:
    kinds: dict[str, Any] = {"dtype": torch.float32, "device": "cuda"} | options
    return plan_run(load_config_of(config.teacher), config, ASKED, lambda shape: speed, **kinds)


def test_layer_calls_by_hand(config: RunConfig) -> None:
    planned = plan(config)
    # Layers 1 to 4 of 6 may go: 6 + (4 + 3 + 2 + 1) runs, and the teacher's 6; then, of 5 layers, 3.
    assert planned.rounds == 2 and planned.layer_tokens["scoring"] == 100 * (16 + 6) + 100 * (5 + 3 + 2 + 1 + 6)
    # 3 tokens once and 2 after them, and 3 texts of 2 + 6: the teacher and two students.
    assert planned.layer_tokens["evaluation"] == (5 + 24) * (6 + 5 + 4)
    # 320 tokens: the teacher's 6 layers, and the student's.
    assert planned.layer_tokens["training"] == 320 * (6 + 5) + 320 * (6 + 4)
    assert planned.seconds["scoring"] == planned.layer_tokens["scoring"]
    assert plan(config, gpus=2).seconds["scoring"] == planned.seconds["scoring"] / 2


def test_each_process_updates_all_that_trains_or_its_part(config: RunConfig) -> None:
    updating = replace(UNIT, layer=0.0, trained_layer=0.0, update=1.0)
    config.distill.train = "all"
    alone = plan(config, updating)
    # Ten steps of 32 tokens in each of two rounds, of five layers and of four.
    assert alone.seconds["training"] == pytest.approx(10 * alone.trained * (1 + 4 / 5))
    assert plan(config, updating, gpus=4).seconds["training"] == pytest.approx(alone.seconds["training"])
    assert plan(config, updating, gpus=4, fsdp=True).seconds["training"] == pytest.approx(alone.seconds["training"] / 4)


def test_what_processes_exchange_by_hand(config: RunConfig) -> None:
    silent = replace(UNIT, layer=0.0, trained_layer=0.0)
    model = tiny_model("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    config.distill.train = "all"
    config.distill.tokens_per_step = 128  # eight rows: of four processes each has two, one at a time
    config.distill.batch_size = 1
    adding, gathering = replace(silent, add_up=1.0), replace(silent, gather=1.0)
    steps = 2  # of 320 tokens, in each of two rounds: of five layers, and of four
    assert plan(config, adding).seconds["training"] == 0
    assert plan(config, adding, gpus=4).seconds["training"] == pytest.approx(steps * 4 * layer * (5 + 4))
    assert plan(config, gathering, gpus=4).seconds["training"] == 0
    split: dict[str, Any] = {"gpus": 4, "fsdp": True, "dtype": torch.bfloat16}
    assert plan(config, adding, **split).seconds["training"] == pytest.approx(2 * steps * 4 * layer * (5 + 4))
    # Forward six layers of the teacher's and the student's, backward those, embeddings and head; all of it at the end.
    embedding = model.get_input_embeddings().weight.numel()
    by_round = [
        4 * 2 * ((6 + n + n) * layer + 2 * embedding) + 2 * (count_parameters(model) + n * layer) for n in (5, 4)
    ]
    assert plan(config, gathering, **split).seconds["training"] == pytest.approx(sum(by_round))


def test_a_training_that_is_split_has_a_speed_of_its_own(config: RunConfig) -> None:
    """On a CPU the system clears large blocks each time; scoring is not concerned."""
    config.distill.train = r"layers\.5\."
    slow = replace(UNIT, trained_layer=0.0, frozen_layer=3.0)
    plain, split = plan(config, replace(slow, frozen_layer=0.0)), plan(config, slow)
    assert split.seconds["training"] == 3 * plain.seconds["training"] > 0
    assert split.seconds["scoring"] == plain.seconds["scoring"]


@pytest.mark.parametrize("split", [False, True])
def test_what_is_timed_has_large_blocks_cleared_where_weights_are_split(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layer, the losses and the optimizer, and not of what scoring and generation take."""
    cleared, held = [], 0

    @contextmanager
    def given_back() -> Iterator[None]:
        nonlocal held
        held += 1
        yield
        held -= 1

    def seconds(work: Callable[[], Any], device: torch.device) -> float:
        cleared.append(held)
        work()
        return 1.0

    monkeypatch.setattr("layerpeel.plan.speed.large_blocks_given_back", given_back)
    monkeypatch.setattr("layerpeel.plan.speed._seconds", seconds)
    monkeypatch.setattr("layerpeel.plan.speed._decode_times", lambda *_: (0.0, 0.0))
    distill = DistillConfig(text="none", sequence_length=16)
    speed = Speed.measure(tiny_model("llama").config, distill, torch.float32, "cpu", split=split)
    assert cleared == ([0, 0, 1, 1, 1, 1, 0] if split else [0] * 6) and bool(speed.frozen_layer) == split


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("processes", [2, 3])
def test_what_an_exchange_takes_is_measured(processes: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerpeel.plan.exchange.SIZE", 4096)
    add_up, gather = exchange_times(processes, split=split)
    assert 0 < add_up < 1e-3 and 0 < gather < 1e-3


@pytest.mark.parametrize(("gpus", "threads", "times"), [(1, 3, 1.0), (2, 1, 1.0), (3, 1, 1.0), (6, 1, 2.0)])
def test_processes_of_a_cpu_share_its_cores(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, gpus: int, threads: int, times: float
) -> None:
    had: list[int] = []

    def measure(cls: type[Speed], *given: Any, **_options: Any) -> Speed:
        had.append(torch.get_num_threads())
        return replace(UNIT, head=2.0)

    monkeypatch.setattr(Speed, "measure", classmethod(measure))
    monkeypatch.setattr("layerpeel.plan.machine.exchange_times", lambda processes, split: (float(processes), 0.5))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        planner = Planner(config, gpus=gpus)
        planned = planner.plan(config, ASKED)
        assert (had, torch.get_num_threads()) == ([threads], 3)
    finally:
        torch.set_num_threads(before)
    exchanged = {"add_up": float(gpus), "gather": 0.5} if gpus > 1 else {}
    assert planner.speeds[torch.float32] == replace(replace(UNIT, head=2.0).times(times), **exchanged)
    assert planned.seconds["scoring"] == plan(config, replace(UNIT, head=2.0)).seconds["scoring"] * times / gpus
    assert UNIT.times(2.0) == Speed(2.0, 2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0)


def test_text_from_the_teacher_by_hand(config: RunConfig) -> None:
    config.distill.repair = False
    assert "sampling" not in plan(config).seconds
    config.distill.text = [TeacherTextConfig(), TextConfig(path="none", weight=3.0)]
    planned = plan(config, replace(UNIT, head=0.5, decode_call=100.0, draw=0.25))
    # A quarter of what two rounds train on, through 6 layers; few tokens share a step's call of a layer.
    assert planned.layer_tokens["sampling"] == 160 * 6
    rows = 2**17 // 16
    assert planned.seconds["sampling"] == pytest.approx(160 * (6 * (1 + 100 / rows) + 0.5 + 0.25))
    config.distill.text = [TeacherTextConfig(tokens=5000)]
    assert plan(config).layer_tokens["sampling"] == 5000 * 6


def test_repair_by_hand(config: RunConfig) -> None:
    config.distill.repair = RepairConfig(tokens=1000)
    planned = plan(config)
    # The teacher's 6 layers once, and the student's from layer 1 on three times: 4 of 5 layers, then 3 of 4; the one
    # before the gap once more.
    assert planned.layer_tokens["repair"] == 1000 * (6 + 3 * 4 + 1) + 1000 * (6 + 3 * 3 + 1)
    assert planned.seconds["repair"] > planned.layer_tokens["repair"]  # sums and solutions besides
    # Of both projections, 48 and 32 inputs and 32 outputs: sums of two kinds of tokens in fp32, four such in fp64.
    assert planned.repair_memory["sums and factors of a layer's projections"] == (80 * 80 + 80 * 32) * (2 * 4 + 4 * 8)
    on_cpu = repair_memory(planned.shape, 1000, "cpu", streamed=False)
    assert on_cpu["hidden states of teacher and student"] == 2 * 1000 * 32 * 4
    config.distill.repair = False
    assert "repair" not in plan(config).seconds and not plan(config).repair_memory


def test_ranking_once_and_training_once(config: RunConfig) -> None:
    config.score.every = 0
    planned = plan(config)
    assert planned.layer_tokens["scoring"] == 100 * (16 + 6)
    config.distill.when = "end"
    assert plan(config).layer_tokens["training"] == 640 * (6 + 4)
    config.distill.when = "half"
    assert plan(config).layer_tokens["training"] == 160 * (6 + 5) + (160 + 320) * (6 + 4)


def test_repaired_kl_runs_more_layers_than_skipping_alone() -> None:
    skipped, repaired = (count_work(make_metric(name), 6, [1, 2, 3], 10, []) for name in ("teacher_kl", "repaired_kl"))
    assert (skipped.layer_tokens, repaired.layer_tokens) == (10 * (6 + 4 + 3 + 2), 10 * (6 + 4 + 3 + 2 + 3 * 9))


def test_block_influence_skips_nothing() -> None:
    work = count_work(make_metric("block_influence"), 6, [1, 2, 3], 10, [], teacher_layers=6)
    assert (work.layer_tokens, work.head_tokens, work.one_by_one) == (60, 0, 6)


def test_weights_and_what_trains_by_hand(config: RunConfig) -> None:
    model = tiny_model("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    for train, layers in (("all", 5), ("neighbours", 2), (r"layers\.5\.", 1)):
        config.distill.train = train
        planned = plan(config)
        assert planned.trained == layers * layer
        parts = planned.training_memory
        assert parts["weights"] == 4 * count_parameters(model)
        assert (parts["trained copies in fp32"], parts["AdamW"]) == (4 * layers * layer, 8 * layers * layer)
    assert plan(config, dtype=torch.bfloat16).training_memory["weights"] == 2 * count_parameters(model)
    config.distill.optimizer = "Muon"
    norms = sum(parameter.numel() for parameter in model.model.layers[0].parameters() if parameter.ndim == 1)
    config.distill.train = r"layers\.5\."
    assert plan(config).training_memory["Muon and AdamW"] == 4 * (layer - norms) + 8 * norms
    config.distill.optimizer = "AdamW"
    assert "mean of the last weights" not in parts
    config.distill.average_last = 0.5
    split = plan(config, gpus=4, fsdp=True).training_memory
    assert split["mean of the last weights"] == layer
    assert split["AdamW"] == 2 * layer and split["weights"] == count_parameters(model)
    assert split["weights that are gathered, and a layer's gradients"] == max(
        16 * layer, 4 * model.lm_head.weight.numel()
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_what_a_layer_keeps_is_what_it_keeps(family: str) -> None:
    model = tiny_model(family)
    layerwise = LayerwiseModel(model)
    model.requires_grad_(False)
    layerwise.layers[0].requires_grad_(True)
    hidden, arguments = layerwise.begin(torch.zeros(3, 16, dtype=torch.long))
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layerwise.layer(0, hidden.detach().requires_grad_(), arguments[0])
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in not_counted)
    shape = shape_of(empty_model(model.config, torch.float32), 3, 16)
    assert output.grad_fn is not None and shape.kept * 48 == pytest.approx(real, rel=0.1)
    assert shape.parameters == count_parameters(model) and shape.layers == len(layerwise.layers)


def test_a_processor_by_its_figures() -> None:
    shape = Shape(4, 8, 100, 1000, 200, 16, 800, 2, 1.0, 1)
    speed = Speed.of_processor(shape, flops=1e3, bandwidth=1e2)
    assert (speed.layer, speed.trained_layer, speed.head, speed.head_loss) == pytest.approx((0.4, 1.2, 1.6, 4.8))
    assert (speed.decode_call, speed.decode_row, speed.update) == pytest.approx((4.0, 0.4, 0.28))
    assert speed.draw == pytest.approx(32.0)  # 100 logits of 4 bytes, read or written eight times


def test_the_publishers_generation_options_do_not_slow_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []

    def generate(self: GenerationMixin, ids: torch.Tensor, **kinds: Any) -> None:
        options.append(self.generation_config.to_diff_dict() | {"rows": len(ids)})

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr("layerpeel.plan.speed.LEAST_SECONDS", 0.0)
    one, two = tiny_model("llama"), tiny_model("llama")
    for model in (one, two):
        model.generation_config = GenerationConfig(num_beams=4, repetition_penalty=1.3, cache_implementation="static")
    _decode_times(one, two, torch.device("cpu"))
    assert options and not {"num_beams", "repetition_penalty", "cache_implementation"} & set().union(*options)
    assert one.generation_config.num_beams == 4  # as it was


def test_layers_are_timed_in_generation_with_a_small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[PreTrainedModel] = []

    def timed(one: PreTrainedModel, two: PreTrainedModel, device: torch.device) -> tuple[float, float]:
        models.extend((one, two))
        return 0.0, 0.0

    monkeypatch.setattr("layerpeel.plan.speed._decode_times", timed)
    monkeypatch.setattr("layerpeel.plan.speed._seconds", lambda work, device: work() or 1.0)
    teacher = tiny_model("llama", vocab_size=5000, pad_token_id=4999).config
    Speed.measure(teacher, DistillConfig(text="none", sequence_length=16), torch.float32, "cpu")
    assert [(len(model.model.layers), model.config.vocab_size) for model in models] == [(1, 1024), (2, 1024)]
    assert teacher.vocab_size == 5000


def test_long_calls_are_timed_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def work(seconds: float) -> Callable[[], None]:
        def take() -> None:
            now[0] += seconds
            calls.append(seconds)

        return take

    monkeypatch.setattr("layerpeel.plan.speed.time.perf_counter", lambda: now[0])
    for seconds, times in ((0.01, 50), (0.25, 6), (2.0, 3), (60.0, 2)):
        calls.clear()
        assert _seconds(work(seconds), torch.device("cpu")) == pytest.approx(seconds)
        assert times <= len(calls) <= times + 1


def test_a_draw_is_timed_as_the_text_is_drawn_from_the_real_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[tuple[torch.Size, int, float]] = []

    def draw(scores: torch.Tensor, uniforms: torch.Tensor, top_p: float) -> torch.Tensor:
        draws.append((scores.shape, len(uniforms), top_p))
        return scores

    monkeypatch.setattr("layerpeel.plan.speed._decode_times", lambda one, two, device: (0.0, 0.0))
    monkeypatch.setattr("layerpeel.plan.speed._seconds", lambda work, device: work() or 32.0)
    monkeypatch.setattr("layerpeel.plan.speed.drawn", draw)
    teacher = tiny_model("llama", vocab_size=5000, pad_token_id=4999).config
    texts = ([TextConfig(path="none")], [TeacherTextConfig(), TeacherTextConfig(top_p=0.9)])
    for text in texts:
        speed = Speed.measure(teacher, DistillConfig(text=text, sequence_length=16), torch.float32, "cpu")
        assert speed.draw == 0.5  # of 64 rows at once
    assert draws == [((64, 5000), 64, 1.0), ((64, 5000), 64, 0.9)]


WIDER = """
from torch import nn
from transformers import LlamaForCausalLM

class Wider(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            sizes = config.hidden_size, 500, config.intermediate_size
            layer.mlp.up_proj = nn.Sequential(nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:]))
        self.post_init()
"""


def test_a_model_of_its_own_code_is_the_one_that_is_planned(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    teacher = Path(config.teacher)
    fields = json.loads((teacher / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "wider.Wider"}}
    (teacher / "config.json").write_text(json.dumps(fields))
    (teacher / "wider.py").write_text(WIDER)
    own = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(teacher), trust_remote_code=True)
    own.save_pretrained(teacher)
    timed: list[PreTrainedModel] = []
    monkeypatch.setattr("layerpeel.plan.speed._decode_times", lambda *models: timed.extend(models[:2]) or (0.0, 0.0))
    monkeypatch.setattr("layerpeel.plan.speed._seconds", lambda work, device: 1.0)
    config = config.model_copy(update={"trust_remote_code": True, "device": "cpu", "dtype": "float32"})
    made = Planner(config).plan(config, ASKED)
    assert made.shape.parameters == count_parameters(own) > 6 * 500 * own.config.hidden_size
    assert made.shape.kept > 4 * 500  # the inner activations among it
    assert [type(model).__name__ for model in timed] == ["Wider"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom"])  # the second cannot keep documents of a row apart
def test_measured_speeds_are_times(family: str) -> None:
    teacher = tiny_model(family).config
    distill = DistillConfig(text="none", sequence_length=16, tokens_per_step=32)
    speed = Speed.measure(teacher, distill, torch.float32, "cpu")
    assert 0 < speed.layer < 1 and 0 < speed.trained_layer < 1 and 0 < speed.head < 1 and 0 < speed.update < 1
    assert 0 < speed.draw < 1
    assert speed.decode_call >= 0 and speed.decode_row >= 0 and speed.head_loss > 0


def test_a_layer_that_trains_is_timed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By operations, which no other work on the machine changes: backward takes two for each of forward."""

    def operations(work: Callable[[], Any], device: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    monkeypatch.setattr("layerpeel.plan.speed._seconds", operations)
    monkeypatch.setattr("layerpeel.plan.speed._decode_times", lambda *_: (0.0, 0.0))
    speed = Speed.measure(
        tiny_model("llama").config, DistillConfig(text="none", sequence_length=16), torch.float32, "cpu"
    )
    assert speed.layer > 0 and 2.5 < speed.trained_layer / speed.layer <= 3.5


@pytest.mark.slow
def test_the_page_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = importlib.util.spec_from_file_location("plan_benchmark", root / "benchmarks" / "plan.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    names = ", ".join(benchmark.SHAPES)
    monkeypatch.setattr(benchmark, "SHAPES", {"Qwen2.5-3B": benchmark.SHAPES["Qwen2.5-3B"]})  # the others take seconds
    printed = benchmark.table().replace("Of Qwen2.5-3B,", f"Of {names},").splitlines()
    assert printed == [line for line in page if "| Qwen2.5-7" not in line]


def test_scoring_memory_by_hand() -> None:
    shape = Shape(
        layers=4,
        width=8,
        vocabulary=100,
        parameters=1000,
        layer_parameters=200,
        inner=16,
        head_parameters=800,
        itemsize=2,
        kept=10.0,
        cache=6,
    )
    texts: list[list[Request]] = [[Generation((1,) * 5, 7, ())] * 3]
    score, budget = ScoreConfig(decide="task_quality", tokens=50), 2**20
    parts = scoring_memory(shape, score, texts, 200, {"text": 0, "tasks": 3}, budget, "cuda")
    # 9 rows of 5 + 7 tokens go in and out of a layer; two of three branches, on average, leave keys of 4 layers behind.
    # In the layer, half of the 10 bytes that a backward pass would want.
    read = 2 * 9 * 12 * 8 * 2 + 9 * 12 * 5 + 9 * 12 * 6 * 4 * 2 / 3
    assert parts["branches of candidates and their caches"] == read
    assert (parts["weights"], parts["trained weights of the student"]) == (2000, 400)
    parts = scoring_memory(shape, score, [], 200, {"text": 3, "tasks": 1}, budget, "cuda")
    assert parts["branches of candidates and their caches"] == 2 * 150 * 8 * 2 + 150 * 5
    asked: list[list[Request]] = [[LogLikelihood((1, 2, 3), (4, 5))] * 6]
    parts = scoring_memory(shape, score, asked, 200, {"text": 0, "tasks": 3}, budget, "cuda")
    assert parts["branches of candidates and their caches"] == 2 * 90 * 8 * 2 + 90 * 5
    on_cpu = scoring_memory(shape, score, asked, 200, {"text": 0, "tasks": 3}, budget, "cpu")
    changing = on_cpu["branches of candidates and their caches"] + on_cpu["chunks of logits"]
    assert on_cpu["unused, between tensors"] == pytest.approx(0.4 * changing) and "unused, between tensors" not in parts
    wide = replace(shape, cache=60)  # what the rows that write on keep is more than what is read
    parts = scoring_memory(wide, score, texts, 200, {"text": 0, "tasks": 3}, budget, "cuda")
    assert parts["branches of candidates and their caches"] == 9 * 12 * 60 * 4


def test_layers_that_are_read_from_the_disk(config: RunConfig) -> None:
    """Three at a time are in memory, and all that is outside of layers; what trains is a copy as ever."""
    model = tiny_model("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    config.distill.train, config.distill.repair = "neighbours", RepairConfig(tokens=1000)
    in_memory = plan(config)
    config.score.weights = config.distill.weights = "stream"
    streamed = plan(config)
    parts, before = streamed.training_memory, in_memory.training_memory
    for memory in (parts, streamed.scoring_memory, streamed.repair_memory):
        assert memory["weights"] == 4 * (count_parameters(model) - 3 * layer)
    assert (in_memory.scoring_memory["trained weights of the student"], in_memory.trained) == (4 * 2 * layer, 2 * layer)
    assert not streamed.scoring_memory["trained weights of the student"]
    assert parts["trained copies in fp32"] == before["trained copies in fp32"] == 4 * 2 * layer
    # Of the graph's four layers, the two that do not train leave only what enters them, and run again, one at a time.
    tokens = 2 * 16  # in a micro-batch
    kept = streamed.shape.kept * tokens
    name = "activations, hidden states and chunks of logits"
    assert before[name] - parts[name] == pytest.approx(2 * kept - 2 * tokens * 32 * 4 - kept)
    split = plan(config, gpus=2, fsdp=True)
    assert split.training_memory["weights"] == 2 * count_parameters(model)
    assert split.end_memory["weights that are whole again"] == parts["weights"] + 4 * 2 * layer


def split_over_four(config: RunConfig, **options: Any) -> Plan:
    config.distill.train = "all"
    return plan(config, gpus=4, fsdp=True, dtype=torch.bfloat16, **options)


def test_memory_at_the_end_of_a_training_that_was_split_by_hand(config: RunConfig) -> None:
    model = tiny_model("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    planned, on_cpu = split_over_four(config), split_over_four(config, device="cpu")
    # All frozen weights and five layers that train: a quarter of each, and all of them again in bf16.
    parts = {
        "weights": 2 * count_parameters(model) / 4,
        "trained copies in fp32": 5 * layer,
        "AdamW": 10 * layer,
        "weights that are whole again": 2 * (count_parameters(model) + 5 * layer),
    }
    assert planned.end_memory == parts
    parts["weights as they were, to start a round again"] = 2 * 5 * layer
    parts["gloo's copy of a matrix"] = 2 * (model.lm_head.weight.numel() + 32)  # with the final norm
    assert on_cpu.end_memory.pop("Python and its libraries") and on_cpu.end_memory == parts
    assert not plan(config, gpus=4, device="cpu").end_memory


def test_a_peak_is_that_of_the_largest_phase() -> None:
    shape = Shape(4, 8, 100, 1000, 200, 16, 800, 2, 1.0, 1)
    training, scoring, end = ({"weights": size} for size in (50.0, 40.0, 60.0))
    planned = Plan(shape, 1, 1, training, scoring, {}, end, {}, {}, {}, 4)
    assert list(planned.phases) == ["training", "its end", "scoring"]
    assert planned.peak == planned.to_json()["peak"] == 60.0 and replace(planned, end_memory={}).peak == 50.0


def test_gathered_layers_on_a_cpu_are_copied_by_gloo(config: RunConfig) -> None:
    layer = sum(parameter.numel() for parameter in tiny_model("llama").model.layers[0].parameters())
    name = "weights that are gathered, and a layer's gradients"
    # In bf16 the layer, the one below, its gradient, and what is received; in fp32 what is sent of that, and its sum.
    assert split_over_four(config, device="cpu").training_memory[name] == (4 * 2 + 2 * 4) * layer
    assert split_over_four(config).training_memory[name] == (3 * 2 + 4) * layer


def test_gradients_are_summed_in_a_bucket(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "activations, hidden states and chunks of logits"
    config.distill.tokens_per_step = 16  # one micro-batch: only what trains is there when its gradients are summed
    config.distill.train = "all"
    alone, two = plan(config), plan(config, gpus=2)
    assert two.training_memory[name] == pytest.approx(max(alone.training_memory[name], 4 * two.trained))
    monkeypatch.setattr("layerpeel.plan.memory.BUCKET", 10**8)
    config.distill.losses = {}
    large = replace(TrainingMemory(two.shape, TrainingRecipe(config.distill, 2), 10**9, 0, 1, "cuda", 1))
    assert large.step()[name] == 4 * 10**8
    assert replace(large, recipe=TrainingRecipe(config.distill, 1)).step()[name] < 10**8


def test_a_split_layer_keeps_no_copies_of_its_weights(config: RunConfig) -> None:
    empty = empty_model(tiny_model("llama").config, torch.bfloat16)
    matrices = sum(p.numel() for p in empty.model.layers[0].parameters() if p.dim() > 1)
    copied, gathered = (shape_of(empty, 1, 16, split=split).kept * 16 for split in (False, True))
    assert copied - gathered == 2 * matrices  # autocast's, in bf16


def test_a_plan_is_json(config: RunConfig) -> None:
    written = json.loads(json.dumps(plan(config).to_json()))
    assert written["peak"] == sum(written["training_memory"].values()) or written["peak"] == sum(
        written["scoring_memory"].values()
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt"])
def test_a_quantised_teacher_is_refused_before_a_run_is_planned(config: RunConfig, method: str) -> None:
    path = Path(config.teacher) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError, match=rf"the model is quantised .config\.json says {method}., which is not undone"):
        read_for_plan(config)
