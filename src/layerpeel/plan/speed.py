"""How fast a model's parts run: measured on this machine with random weights, or from a processor's figures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from layerpeel.config.distill import DistillConfig
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import StepOutputs
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.config_fields import rewrite_config, text_config
from layerpeel.model.devices import pick_device
from layerpeel.plan.shape import Shape

NEW = 6  # tokens that are generated for a time
REPEATS, LEAST_SECONDS = 5, 0.5  # of what is timed, at least
MOST_KEPT_BY_MALLOC = 31 * 2**20  # bytes; glibc's own limit is 32 MiB


@dataclass(frozen=True)
class Speed:
    """Seconds, for one token unless said otherwise.

    Attributes:
        layer: through one layer, forward.
        trained_layer: through one layer forward and backward, with gradients of its weights.
        head: through the head.
        head_loss: through the head of teacher and student, and back.
        decode_call: for a step of generation through one layer, whatever the rows; and
        decode_row: for each row of it besides.
        update: for the optimizer to change one parameter.
    """

    layer: float
    trained_layer: float
    head: float
    head_loss: float
    decode_call: float
    decode_row: float
    update: float

    @classmethod
    def of_processor(cls, shape: Shape, flops: float, bandwidth: float) -> Speed:
        """From floating-point operations a second that are reached, and bytes of memory a second.

        A multiply-add is two operations for each weight; backward takes twice as many as forward. A step of
        generation reads the layer's weights, and an update reads and writes 28 bytes (weight, gradient, two moments).
        """
        layer, head = 2 * shape.layer_parameters / flops, 2 * shape.head_parameters / flops
        return cls(
            layer=layer,
            trained_layer=3 * layer,
            head=head,
            head_loss=3 * head,
            decode_call=shape.layer_parameters * shape.itemsize / bandwidth,
            decode_row=layer,
            update=28 / bandwidth,
        )

    @classmethod
    def measure(cls, config: PretrainedConfig, distill: DistillConfig, dtype: torch.dtype, device: str) -> Speed:
        """Times a random model of one layer, and one of two, of this shape."""
        target = pick_device(device)
        # As in a run: until glibc has seen a large tensor go, it gives all back at once, and layers are slower by half.
        torch.empty(MOST_KEPT_BY_MALLOC, dtype=torch.uint8)
        one, two = (_random_model(config, layers, dtype).to(target) for layers in (1, 2))
        layerwise = LayerwiseModel(one)
        rows, length = distill.batch_size, distill.sequence_length
        ids = torch.randint(0, layerwise.vocab_size, (rows, length), device=target)
        packed = torch.arange(length).remainder(max(1, length // 2)).expand(rows, -1)
        hidden, arguments = layerwise.begin(ids, packed if distill.packing and layerwise.runs_packed else None)
        mask = torch.ones_like(ids, dtype=torch.bool)
        tokens = ids.numel()
        trained = list(layerwise.layers[0].parameters())
        few = hidden.flatten(0, 1)[: layerwise.logit_rows()].detach()

        def forward() -> None:
            with torch.no_grad():
                layerwise.layer(0, hidden.detach(), arguments[0])

        def both_ways() -> None:
            with torch.autocast(target.type, dtype, enabled=dtype is not torch.float32):
                layerwise.layer(0, hidden.detach().requires_grad_(), arguments[0]).float().square().mean().backward()

        def head() -> None:
            with torch.no_grad():
                layerwise.logits(few).logsumexp(-1).sum()

        losses = LossSum(distill.losses)

        def head_loss() -> None:
            final = hidden.detach().requires_grad_()
            outputs = StepOutputs(
                student_final=final,
                teacher_final=hidden.detach(),
                student_hidden={0: final},
                teacher_hidden={0: hidden.detach()},
                mask=mask,
                labels=ids,
                student_head=layerwise,
                teacher_head=layerwise,
                step_tokens=tokens,
                step_labels=tokens,
                micro_batches=1,
            )
            losses(outputs)[0].backward()

        layer, head_time, loss_time = (_seconds(work, target) for work in (forward, head, head_loss))
        one.requires_grad_(False)
        for parameter in trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        trained_layer = _seconds(both_ways, target)
        optimizer = torch.optim.AdamW(trained)
        update = _seconds(optimizer.step, target)
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        call, row = _decode_times(one, two, target)
        return cls(
            layer / tokens,
            trained_layer / tokens,
            head_time / len(few),
            loss_time / tokens,
            call,
            max(row, layer / tokens),  # a small difference of large ones: not less than in a batch
            update / sum(parameter.numel() for parameter in trained),
        )


def _random_model(config: PretrainedConfig, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the first layers of this shape, with random weights."""
    own = copy.deepcopy(config)
    rewrite_config(text_config(own), list(range(min(layers, text_config(own).num_hidden_layers))))
    return AutoModelForCausalLM.from_config(own, dtype=dtype).eval()


def _decode_times(one: PreTrainedModel, two: PreTrainedModel, device: torch.device) -> tuple[float, float]:
    """Of a step of generation in one layer: seconds for the call, and for each row."""

    def step(model: PreTrainedModel, rows: int) -> float:
        ids = torch.zeros(rows, 32, dtype=torch.long, device=device)

        def generate(new: int) -> None:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, eos_token_id=None
                ),
            )

        return (_seconds(lambda: generate(2 + NEW), device) - _seconds(lambda: generate(2), device)) / NEW

    few, many = 4, 256
    low, high = (max(step(two, rows) - step(one, rows), 0.0) for rows in (few, many))
    row = max(high - low, 0.0) / (many - few)
    return max(low - few * row, 0.0), row


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of some calls, after a first one."""
    times: list[float] = []
    while len(times) <= REPEATS or sum(times) < LEAST_SECONDS:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
