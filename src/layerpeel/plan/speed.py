"""How fast a model's parts run: measured on this machine with random weights, or from a processor's figures.

What is timed is what runs do: layers and head as `training/forward.py` and `losses/` run them, the optimizer of
`training/recipe.py`, `generate` in place of `inference/decoding.py`, and a draw of `inference/sampling.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from statistics import median

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from layerpeel.config.distill import DistillConfig
from layerpeel.config.fields import TeacherTextConfig
from layerpeel.inference.decoding import plain_generation
from layerpeel.inference.finite import refuse_nan
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.sampling import drawn
from layerpeel.losses.base import StepOutputs
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model.building import build_model
from layerpeel.model.config_fields import context_length, rewrite_config, text_config
from layerpeel.model.devices import pick_device
from layerpeel.plan.shape import Shape
from layerpeel.processes.malloc import large_blocks_given_back
from layerpeel.training.recipe import MASTER_DTYPE, TrainingRecipe, autocast

NEW, CONTEXT = 6, 128  # tokens that are generated for a time, after how many
WORDS = (
    1024  # in the vocabulary of models whose layers are timed by generating: a real one's logits would take gigabytes
)
ROWS_DRAWN, DRAWS_PASSES = 64, 8  # tokens drawn at a time for a time; times that their logits are read or written
REPEATS, LEAST_SECONDS = 5, 0.5  # of what is timed, at least
MOST_SECONDS = 6.0  # on one thing that is timed; long calls need fewer repeats
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
        draw: to draw a token of the teacher's text from its logits.
        add_up, gather: for each byte that processes add up, and gather; 0 where it is not known.
        frozen_layer: through one layer, forward, in a training whose weights are split; 0: as `layer`.
        read: for each parameter of a layer that is read from the disk.
    """

    layer: float
    trained_layer: float
    head: float
    head_loss: float
    decode_call: float
    decode_row: float
    update: float
    draw: float
    add_up: float = 0.0
    gather: float = 0.0
    frozen_layer: float = 0.0
    read: float = 0.0

    @classmethod
    def of_processor(cls, shape: Shape, flops: float, bandwidth: float, distill: DistillConfig | None = None) -> Speed:
        """From floating-point operations a second that are reached, and bytes of memory a second.

        A multiply-add is two operations for each weight; backward takes twice as many as forward. A step of
        generation reads the layer's weights; an update reads and writes weight, gradient and optimizer state (28 bytes
        with AdamW), and a draw the logits a few times over; their own arithmetic is not counted.

        Args:
            distill: names the optimizer; the default one's if not given.
        """
        layer, head = 2 * shape.layer_parameters / flops, 2 * shape.head_parameters / flops
        return cls(
            layer=layer,
            trained_layer=3 * layer,
            head=head,
            head_loss=3 * head,
            decode_call=shape.layer_parameters * shape.itemsize / bandwidth,
            decode_row=layer,
            update=TrainingRecipe(distill or DistillConfig()).update_bytes / bandwidth,
            draw=DRAWS_PASSES * 4 * shape.vocabulary / bandwidth,
        )

    def times(self, factor: float) -> Speed:
        """The same, so many times slower."""
        return Speed(*(factor * seconds for seconds in astuple(self)))

    @classmethod
    def measure(
        cls,
        config: PretrainedConfig,
        distill: DistillConfig,
        dtype: torch.dtype,
        device: str,
        *,
        trust_remote_code: bool = False,
        split: bool = False,
    ) -> Speed:
        """Times a random model of one layer, and one of two, of this shape.

        Args:
            split: whether weights are split in training, for which the system clears large blocks each time.
        """

        def built(layers: int, vocabulary: int | None = None) -> PreTrainedModel:
            shortened = _shortened(config, layers, vocabulary)
            return build_model(shortened, dtype, trust_remote_code=trust_remote_code).to(target)

        target = pick_device(device)
        # As in a run: until glibc has seen a large tensor go, it gives all back at once, and layers are slower by half.
        torch.empty(MOST_KEPT_BY_MALLOC, dtype=torch.uint8)
        timed = _Timed(built(1), TrainingRecipe(distill))
        layer, head = timed.layer(), timed.head()
        with large_blocks_given_back() if split else nullcontext():
            frozen_layer, head_loss = timed.layer() if split else 0.0, timed.head_loss()
            trained_layer, update = timed.training()
        one, two = (built(layers, WORDS) for layers in (1, 2))
        call, row = _decode_times(one, two, target)
        return cls(
            layer,
            trained_layer,
            head,
            head_loss,
            call,
            max(row, layer),  # a small difference of large ones: not less than in a batch
            update,
            timed.draw(),
            frozen_layer=frozen_layer,
        )


class _Timed:
    """A model of one layer, with a training batch of random tokens, whose parts are timed; seconds a token."""

    def __init__(self, model: PreTrainedModel, recipe: TrainingRecipe) -> None:
        self.model, self.recipe, self.layerwise = model, recipe, LayerwiseModel(model)
        rows, length = recipe.micro_batch_rows, recipe.config.sequence_length
        self.ids = torch.randint(0, self.layerwise.vocab_size, (rows, length), device=model.device)
        packed = torch.arange(length).remainder(max(1, length // 2)).expand(rows, -1)
        positions = packed if recipe.packing(self.layerwise) == "bfd" else None
        self.hidden, self.arguments = self.layerwise.begin(self.ids, positions)
        self.losses = LossSum(recipe.config.losses)

    def layer(self) -> float:
        """Through the layer, forward."""

        def forward() -> None:
            with torch.no_grad():
                self.layerwise.layer(0, self.hidden.detach(), self.arguments[0])

        return _seconds(forward, self.model.device) / self.ids.numel()

    def head(self) -> float:
        """Through the head."""
        inputs = self.hidden.flatten(0, 1)[: self.layerwise.logit_rows()].detach()

        def logits() -> None:
            with torch.no_grad():
                self.layerwise.logits(inputs).logsumexp(-1).sum()

        return _seconds(logits, self.model.device) / len(inputs)

    def head_loss(self) -> float:
        """Through the head of teacher and student and the losses, and back."""

        def both_ways() -> None:
            final = self.hidden.detach().requires_grad_()
            outputs = StepOutputs(
                student_final=final,
                teacher_final=self.hidden.detach(),
                student_hidden={0: final},
                teacher_hidden={0: self.hidden.detach()},
                mask=torch.ones_like(self.ids, dtype=torch.bool),
                labels=self.ids,
                student_head=self.layerwise,
                teacher_head=self.layerwise,
                step_tokens=self.ids.numel(),
                step_labels=self.ids.numel(),
            )
            self.losses(outputs)[0].backward()

        return _seconds(both_ways, self.model.device) / self.ids.numel()

    def draw(self) -> float:
        """From logits to a token of the teacher's text, beside what the head takes."""
        device, top_p = self.model.device, min(_shares_drawn_from(self.recipe.config), default=1.0)
        logits = torch.randn(ROWS_DRAWN, self.layerwise.vocab_size, device=device)
        uniforms = torch.rand(ROWS_DRAWN, dtype=torch.float64)

        def step() -> None:
            with torch.no_grad():
                drawn(refuse_nan(self.ids, logits.clone()), uniforms, top_p=top_p).argmax(-1)

        return _seconds(step, device) / ROWS_DRAWN

    def training(self) -> tuple[float, float]:
        """Through the layer both ways; and, for each parameter, a step of the optimizer."""
        device, dtype = self.model.device, self.model.dtype
        self.model.requires_grad_(False)
        trained = list(self.layerwise.layers[0].parameters())
        for parameter in trained:
            parameter.data = parameter.data.to(MASTER_DTYPE)
            parameter.requires_grad_(True)

        def both_ways() -> None:
            hidden = self.hidden.detach().requires_grad_()
            with autocast(device.type, dtype):
                self.layerwise.layer(0, hidden, self.arguments[0]).float().square().mean().backward()

        layer = _seconds(both_ways, device) / self.ids.numel()
        rate = self.recipe.config.learning_rate
        optimizers = self.recipe.optimizers(trained, [True] * len(trained), rate=rate, steps=1)
        update = _seconds(optimizers.step, device) / sum(parameter.numel() for parameter in trained)
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        return layer, update


def _shares_drawn_from(config: DistillConfig) -> list[float]:
    """`top_p` of each text that the teacher writes."""
    return [source.top_p for source in config.text if isinstance(source, TeacherTextConfig)]


def _shortened(config: PretrainedConfig, layers: int, vocabulary: int | None) -> PretrainedConfig:
    """A config of the first layers.

    Args:
        vocabulary: as many entries, at most; as given if None.
    """
    config = copy.deepcopy(config)
    text = text_config(config)
    if vocabulary and text.vocab_size > vocabulary:
        text.vocab_size, text.pad_token_id = vocabulary, None
    rewrite_config(text, list(range(min(layers, text.num_hidden_layers))))
    return config


def _decode_times(one: PreTrainedModel, two: PreTrainedModel, device: torch.device) -> tuple[float, float]:
    """Of a step of generation in one layer: seconds for the call, and for each row."""
    room = (context_length(one.config) or CONTEXT + NEW + 2) - NEW - 2
    context = max(1, min(CONTEXT, room))

    def step(model: PreTrainedModel, rows: int) -> float:
        ids = torch.zeros(rows, context, dtype=torch.long, device=device)

        def generate(new: int) -> None:
            with plain_generation(model):
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(
                        do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, eos_token_id=None
                    ),
                )

        return (_seconds(lambda: generate(2 + NEW), device) - _seconds(lambda: generate(2), device)) / NEW

    least, most = 4, 64
    low, high = (max(step(two, rows) - step(one, rows), 0.0) for rows in (least, most))
    row = max(high - low, 0.0) / (most - least)
    return max(low - least * row, 0.0), row


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of some calls, after a first one."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < MOST_SECONDS and (len(times) <= REPEATS or sum(times) < LEAST_SECONDS)):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
