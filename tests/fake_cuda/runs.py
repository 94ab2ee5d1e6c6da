"""What runs on the CPU and on the fake CUDA device, in a process of its own: `python -m tests.fake_cuda.runs FOLDER`.

It writes numbers and counts to FOLDER/results.json, which `test_fake_cuda.py` reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation, LogLikelihood
from layerpeel.losses.loss_sum import LossSum
from layerpeel.model import streaming
from layerpeel.model.layer_inputs import LayerInputRecorder
from layerpeel.model.loading import load_model
from layerpeel.processes.progress import console
from layerpeel.run.loop import peel
from layerpeel.training import gradients
from tests.fake_cuda.device import FakeCuda, fake_cuda
from tests.fake_cuda.names import CASES
from tests.fake_cuda.work import config_of, numbers_of, run, train
from tests.families import save_texts, save_tiny, tiny_ids, tiny_model, tiny_texts, tiny_tokenizer


def count_step(gpu: FakeCuda, folder: Path) -> dict[str, int]:
    """Of the last optimizer step, of one micro-batch."""
    counts: list[dict[str, int]] = []

    def after_step() -> None:
        counts.append(gpu.counts())
        gpu.reset()

    train(tiny_model("llama").to("cuda"), folder, after_step)
    return counts[-1]


def count_batch(gpu: FakeCuda, folder: Path) -> dict[str, int]:
    """Of one batch of log-likelihoods with two candidates."""
    engine = Engine(LayerwiseModel(tiny_model("llama").to("cuda")), tiny_tokenizer(), (2, 3))
    context = tuple(tiny_ids(1, 9)[0].tolist())
    requests = [LogLikelihood(context, tuple(row.tolist())) for row in tiny_ids(8, 3)]
    engine.answer(requests)
    gpu.reset()
    engine.answer(requests)
    return gpu.counts()


def count_token(gpu: FakeCuda, folder: Path) -> dict[str, int]:
    """Of a decoded token, in a call of `generate`."""
    engine = Engine(LayerwiseModel(tiny_model("llama", eos_token_id=None).to("cuda")), tiny_tokenizer())
    counts = []
    for new in (2, 12):
        gpu.reset()
        engine.answer([Generation(tuple(tiny_ids(1, 9)[0].tolist()), new, ())])
        counts.append(gpu.counts())
    return {name: (counts[1][name] - counts[0][name]) // 10 for name in counts[0]}


class AtOnce:
    """Stands in for a thread pool: torch's modes, of which the device is made, are of one thread."""

    def __init__(self, **_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def count_stream(gpu: FakeCuda, folder: Path) -> dict[str, Any]:
    """Of a batch whose layers are read as they run; with the numbers of a model in memory, loaded to the device."""
    checkpoint, ids = save_tiny(folder / "model"), tiny_ids()
    with mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):  # threads of its own
        loaded, _ = load_model(checkpoint, device="cuda", dtype="bfloat16")
        with console.capture() as said:
            load_model(checkpoint, device="cuda")
    in_memory = LayerwiseModel(loaded).forward_with_skips(ids, (2,))
    with mock.patch.object(streaming, "ThreadPoolExecutor", AtOnce):
        streamed, _ = streaming.load_streamed(checkpoint, device="cuda", dtype="bfloat16")
        layerwise = LayerwiseModel(streamed.model, streamed.weights_loaded)
        layerwise.forward_with_skips(ids, (2,))
        gpu.reset()
        hidden = layerwise.forward_with_skips(ids, (2,))
    return gpu.counts() | {
        "said": said.get(),
        "pinned": gpu.pinned_copies.total(),
        "streamed": hidden.float().cpu().flatten().tolist(),
        "in memory": in_memory.float().cpu().flatten().tolist(),
    }


def streamed_run(device: str, folder: Path) -> dict[str, list[float]]:
    """A whole run that reads its layers as they run, repairs and trains; what it scored, lost and measured."""
    with mock.patch.object(streaming, "ThreadPoolExecutor", AtOnce):
        return numbers_of(peel(config_of(folder, f"run-{device}", device, weights="stream")))


COUNTS = {"step": count_step, "batch": count_batch, "token": count_token, "stream": count_stream}


def _on_cpu(function: Callable[..., Any], **names: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function some of whose results are changed."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return replace(result, **{name: change(getattr(result, name)) for name, change in names.items()})

    return changed


def _input_on_cpu(name: str) -> Callable[..., Any]:
    record = LayerInputRecorder.record

    def changed(recorder: LayerInputRecorder, inputs: dict[str, Any]) -> Any:
        return record(recorder, inputs | ({name: inputs[name].cpu()} if name in inputs else {}))

    return changed


def _loss_on_cpu() -> Callable[..., Any]:
    call = LossSum.__call__

    def changed(losses: LossSum, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = call(losses, outputs)
        return total * torch.ones(1), parts

    return changed


def _reads_each_layer(read: Callable[[Tensor], Any]) -> Callable[..., Any]:
    layer = LayerwiseModel.layer

    def changed(layerwise: LayerwiseModel, position: int, hidden: Tensor, arguments: Any) -> Tensor:
        read(hidden.detach())
        return layer(layerwise, position, hidden, arguments)

    return changed


Faults = dict[str, tuple[Any, str, Any]]


def faults() -> Faults:
    """By name: an object, what of it is replaced, and by what."""
    labels = _on_cpu(gradients.run_both, labels=lambda labels: labels.cpu())
    return {
        "labels on the CPU": (gradients, "run_both", labels),
        "loss vector on the CPU": (LossSum, "__call__", _loss_on_cpu()),
        "positions on the CPU": (LayerInputRecorder, "record", _input_on_cpu("position_ids")),
        "masks on the CPU": (LayerInputRecorder, "record", _input_on_cpu("attention_mask")),
        "numpy in a hot loop": (LayerwiseModel, "layer", _reads_each_layer(lambda hidden: hidden.numpy())),
        "item in a hot loop": (LayerwiseModel, "layer", _reads_each_layer(lambda hidden: hidden.sum().item())),
    }


def with_fault(name: str, fault: tuple[Any, str, Any], gpu: FakeCuda, folder: Path) -> dict[str, Any]:
    """What is counted with a fault, or the error it ends in."""
    count = count_batch if name.startswith("masks") else count_step
    with mock.patch.object(*fault):
        try:
            return count(gpu, folder)
        except (RuntimeError, TypeError) as error:
            return {"error": str(error)}


@contextmanager
def _timed(results: dict[str, Any], name: str) -> Iterator[None]:
    """Keeps the traceback of an exception, so that the other results are there all the same."""
    started = time.monotonic()
    try:
        yield
    except Exception:
        results[name] = {"traceback": traceback.format_exc()}
    print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)


def mixed_devices() -> dict[str, str]:
    """The errors of operations that mix devices."""
    here, there = torch.zeros(3), torch.zeros(3, device="cuda")
    operations: dict[str, Callable[[], Any]] = {
        "add": lambda: there + here,
        "matmul": lambda: torch.eye(3) @ there,
        "where": lambda: torch.where(here > 0, there, 1.0),
        "cat": lambda: torch.cat([here, there]),
        "data": lambda: setattr(torch.nn.Parameter(there), "data", here),
        "numpy": lambda: there.numpy(),
    }
    errors = {}
    for name, operation in operations.items():
        try:
            operation()
            errors[name] = ""
        except (RuntimeError, TypeError) as error:
            errors[name] = str(error)
    return errors


def main(folder: Path) -> None:
    save_texts(folder / "text.jsonl", tiny_texts(3 + 11 * line % 28 for line in range(40)))
    save_texts(folder / "few.jsonl", tiny_texts((9, 12, 9)))
    results: dict[str, Any] = {}
    for family, dtype in CASES:
        with _timed(results, f"{family} {dtype}"):
            on_cpu = run(family, dtype, "cpu", folder)
            with fake_cuda():
                results[f"{family} {dtype}"] = {"cpu": on_cpu, "cuda": run(family, dtype, "cuda", folder)}
    with _timed(results, "streamed run"):
        on_cpu_alone = streamed_run("cpu", folder)
        with fake_cuda():
            results["streamed run"] = {"cpu": on_cpu_alone, "cuda": streamed_run("cuda", folder)}
    with fake_cuda() as gpu:
        results["mixed"] = mixed_devices()
        for name, count in COUNTS.items():
            with _timed(results, name):
                results[name] = count(gpu, folder)
        for name, fault in faults().items():
            with _timed(results, name):
                results[name] = with_fault(name, fault, gpu, folder)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
