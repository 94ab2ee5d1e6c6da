"""Bytes on a device, by what they are for.

Counts what `training/trainer.py` and `training/gradients.py` hold while a round trains, and what `inference/engine.py`
and `importance/scoring.py` hold while layers are scored. What a recipe knows is asked of `training/recipe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from layerpeel.config.score import ScoreConfig
from layerpeel.inference.layerwise import logit_rows_at_a_time, tokens_per_call
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.losses.logits import BYTES_IN_CACHE
from layerpeel.plan.shape import Shape
from layerpeel.processes.malloc import release_unused
from layerpeel.training.parallel import BUCKET
from layerpeel.training.recipe import MASTER_DTYPE, TrainingRecipe

STATES = 12  # hidden states [B, T, D] in fp32: final ones of both models, those compared, their copies and gradients
LOGIT_TENSORS = 5  # of the size of a chunk of logits, in fp32, that a divergence makes of them
FORWARD_SHARE = 0.5  # a layer's peak memory in a forward pass without gradients, over what it would keep for backward
STREAMED = 3  # layers in memory where they are read as they run: that one, the next, and the file's pages of one
UNUSED_ON_CPU = 0.4  # bytes that malloc holds unused for each byte allocated and freed; measured at 440 MB of them


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a process in a round's training, by what it is for.

    Args:
        trained: how many numbers train.
        optimizer_bytes: of optimizer state for them.
        graph: layers of the student that gradients go through.
        split: over how many processes layers are split (FSDP2), and what trains with them.
    """

    shape: Shape
    recipe: TrainingRecipe
    trained: int
    optimizer_bytes: int
    graph: int
    device: str
    split: int

    def step(self) -> dict[str, float]:
        """While a step is made."""
        if not self.trained:
            return {"weights": weight_bytes(self.shape, streamed=self._streamed)}
        activations, gradients = self._activations(), self._wide / self.split
        transient = activations + (gradients if self.recipe.accumulates else 0)  # a step's first backward finds none
        if self.recipe.processes > self.split:  # gradients are summed in one piece, when all of them are there
            transient = max(transient, gradients + min(self._wide, MASTER_DTYPE.itemsize * BUCKET))
        return {
            **self._between_steps(),
            **self._gathered(),
            "gradients": gradients,
            "activations, hidden states and chunks of logits": max(0.0, transient - gradients),
        } | _unused(activations, self.device, streamed=self._streamed)

    def end(self) -> dict[str, float]:
        """Where weights were split: when all are whole again, and their parts still there."""
        if not self.trained or self.split == 1:
            return {}
        gathered = self.shape.itemsize * self.trained + weight_bytes(self.shape, streamed=self._streamed)
        copied = {"gloo's copy of a matrix": self._matrix} if self.device == "cpu" else {}
        return {**self._between_steps(), "weights that are whole again": float(gathered), **copied}

    @property
    def _matrix(self) -> float:
        """Bytes of the larger one of embeddings and head."""
        shape = self.shape
        outside = max(0, shape.parameters - shape.layers * shape.layer_parameters)
        return float(shape.itemsize * max(shape.head_parameters, outside - shape.head_parameters))

    @property
    def _streamed(self) -> bool:
        return self.recipe.config.weights == "stream"

    @property
    def _wide(self) -> float:
        """Bytes of what trains, or of its gradients."""
        return float(MASTER_DTYPE.itemsize * self.trained)

    def _between_steps(self) -> dict[str, float]:
        """What there is all the time."""
        wide = self._wide / self.split
        parts = {
            "weights": weight_bytes(self.shape, streamed=self._streamed and self.split == 1) / self.split,
            "trained copies in fp32": wide,
            self.recipe.optimizer_name: self.optimizer_bytes / self.split,
            **({"mean of the last weights": wide} if self.recipe.config.average_last else {}),
        }
        if self.device == "cpu":  # elsewhere they are in the host's memory
            parts["weights as they were, to start a round again"] = float(self.shape.itemsize * self.trained)
        return parts

    def _gathered(self) -> dict[str, float]:
        """What is gathered to run where weights are split: a layer, the embeddings or the head.

        A layer that trains is gathered in the teacher's dtype, and so are its gradient and the layer below; what is
        sent of the gradient is fp32. On a CPU, gloo has a copy of what it gathers, and of what it sums.
        """
        if self.split == 1:
            return {}
        narrow, wide = (4, 2) if self.device == "cpu" else (3, 1)
        layer = (narrow * self.shape.itemsize + wide * MASTER_DTYPE.itemsize) * self.shape.layer_parameters
        return {"weights that are gathered, and a layer's gradients": max(float(layer), (narrow - 2) * self._matrix)}

    def _activations(self) -> float:
        """Bytes of what a micro-batch needs, forward and backward."""
        shape, distill = self.shape, self.recipe.config
        tokens = self.recipe.micro_batch_rows * distill.sequence_length
        kept = shape.kept * tokens
        again = self.graph if distill.activation_checkpointing else 0  # layers that run again in the backward pass
        if self._streamed and self.split == 1:  # but for those whose weights all train
            again = max(again, self.graph - self.trained // shape.layer_parameters)
        activations = again * tokens * shape.width * shape.itemsize + (self.graph - again) * kept
        activations += kept if again else 0.0
        activations += max(kept, logit_bytes(shape, self.device))  # a layer runs, or the losses
        return activations + STATES * tokens * shape.width * MASTER_DTYPE.itemsize


def weight_bytes(shape: Shape, *, streamed: bool) -> float:
    """Bytes of frozen weights that are in memory at a time.

    Args:
        streamed: whether layers are read from the checkpoint as they run.
    """
    layers = shape.layers - (min(STREAMED, shape.layers) if streamed else shape.layers)
    return float(shape.itemsize * (shape.parameters - layers * shape.layer_parameters))


def repair_memory(shape: Shape, tokens: int, device: str, *, streamed: bool) -> dict[str, float]:
    """Memory of a repair in closed form, on so many tokens, with layers `streamed` as in `weight_bytes`.

    The hidden states are in the host's memory, or in a file where they are large; here they are counted.
    """
    inputs = shape.inner + shape.width  # before a gap, both projections' at once
    numbers = inputs * (inputs + shape.width)
    states = {"hidden states of teacher and student": 2.0 * tokens * shape.width * shape.itemsize}
    parts = {
        "weights": weight_bytes(shape, streamed=streamed),
        "sums and factors of a layer's projections": float(numbers * (2 * 4 + 4 * 8)),
        "a layer's inputs and outputs": float(
            tokens_per_call(shape.width, device) * (shape.kept + 2 * 4 * (shape.inner + 3 * shape.width))
        ),
    }
    return parts | (states if device == "cpu" else {})


def resident_bytes() -> float:
    """Of this process, without what has been freed and not given back, where malloc can tell."""
    release_unused()
    return float(psutil.Process().memory_info().rss)


def _unused(changing: float, device: str, *, streamed: bool) -> dict[str, float]:
    """What an allocator keeps unused, for that many bytes of tensors that are allocated and freed.

    Where layers are `streamed`, malloc gives large blocks back (`model/streaming.py`).
    """
    return {"unused, between tensors": UNUSED_ON_CPU * changing} if device == "cpu" and not streamed else {}


def logit_bytes(shape: Shape, device: str) -> float:
    """Chunks of logits of both models, and what the losses make of them."""
    rows = logit_rows_at_a_time(shape.vocabulary, device) // 2
    chunk = BYTES_IN_CACHE if device == "cpu" else 4 * rows * shape.vocabulary
    return float(2 * rows * shape.vocabulary * shape.itemsize + LOGIT_TENSORS * chunk)


def scoring_memory(
    shape: Shape,
    score: ScoreConfig,
    requests: Sequence[Sequence[Request]],
    trained: int,
    branches: Mapping[str, int],
    budget: int,
    device: str,
) -> dict[str, float]:
    """Memory while the student's layers are scored.

    Args:
        trained: parameters that the student does not share with the teacher.
        branches: of `text` and of `tasks`: the student as it is, and one for each candidate.
        budget: bytes that branches may take.
    """
    fit = {need: shape.tokens_within(budget, max(1, count)) for need, count in branches.items()}
    hidden = shape.width * shape.itemsize

    def forward(tokens: int) -> float:
        """Inputs and outputs of a layer for that many tokens, over all branches, and what the layer needs inside."""
        return 2 * tokens * hidden + FORWARD_SHARE * min(tokens, tokens_per_call(shape.width, device)) * shape.kept

    needs = [forward(min(fit["text"], score.tokens) * branches["text"])]
    for task in requests:
        read = sum(len(r.context) + len(r.continuation) for r in task if isinstance(r, LogLikelihood))
        needs.append(forward(min(fit["tasks"], read) * branches["tasks"]))
        generations = [request for request in task if isinstance(request, Generation)]
        if not generations:
            continue
        prompt, new = max(len(r.prompt) for r in generations), max(r.max_new_tokens for r in generations)
        rows = min(len(generations), max(1, fit["tasks"] // (prompt + new))) * branches["tasks"]
        cache = rows * (prompt + new) * shape.cache * shape.layers
        prefill = cache * (1 + 1 / branches["tasks"]) / 2  # on average, a branch begins in the middle of the layers
        needs.append(max(forward(rows * (prompt + new)) + prefill, cache))
    streamed = score.weights == "stream"  # of the student, too
    logits = 2 * 4 * logit_rows_at_a_time(shape.vocabulary, device) * shape.vocabulary
    return {
        "weights": weight_bytes(shape, streamed=streamed),
        "trained weights of the student": 0.0 if streamed else float(trained * shape.itemsize),
        "branches of candidates and their caches": float(max(needs)),
        "chunks of logits": float(logits),
    } | _unused(max(needs) + logits, device, streamed=streamed)
