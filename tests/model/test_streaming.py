"""Models whose layers stay on the disk score as those in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from layerpeel.config.run import TaskConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError
from layerpeel.importance.scores import LayerScores
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model import streaming
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import StreamedLayers, load_streamed
from layerpeel.tasks.registry import make_tasks
from tests.families import FAMILIES, UNLISTED, save_tiny, tiny_ids, tiny_model, tiny_tokenizer

TEXT = Rows(tiny_ids(), torch.ones(3, 17, dtype=torch.bool))


def saved(folder: Path, family: str, *, tied: bool, shards: bool = False) -> Path:
    # The tokenizer that transformers picks for a family may add an entry of its own.
    size = {} if family in ("gpt2", "gpt_neox") else {"vocab_size": 72}
    model = tiny_model(family, tie_word_embeddings=tied, **size)
    model.save_pretrained(folder, **({"max_shard_size": "20kB"} if shards else {}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def both_ways(folder: Path, config: ScoreConfig, dtype: str = "float32", **inputs: Any) -> tuple[LayerScores, ...]:
    """The scores in memory, and streamed."""
    model, tokenizer = load_model(folder, device="cpu", dtype=dtype)
    files, _ = load_streamed(folder, device="cpu", dtype=dtype)
    stacks = (LayerwiseModel(model), LayerwiseModel(files.model, files.weights_loaded))
    return tuple(score_layers(layerwise, tokenizer, config, text=TEXT, **inputs) for layerwise in stacks)


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_streamed_scores_are_those_in_memory(family: str, tmp_path: Path) -> None:
    whole, streamed = both_ways(saved(tmp_path, family, tied=True), ScoreConfig(decide="teacher_kl"))
    assert streamed.importance == whole.importance


def test_layers_that_have_run_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("layerpeel.model.streaming.give_back_large_blocks", lambda: calls.append(1))
    load_streamed(saved(tmp_path, "llama", tied=True), device="cpu")
    assert calls == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_in_every_form_of_checkpoint(tmp_path: Path, shards: bool, tied: bool, dtype: str) -> None:
    folder = saved(tmp_path, "llama", tied=tied, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) == 1 or shards
    for metric in ("teacher_kl", "repaired_kl", "block_influence"):
        whole, streamed = both_ways(folder, ScoreConfig(decide=metric), dtype)
        assert streamed.importance == whole.importance


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    whole, streamed = both_ways(folder, ScoreConfig(decide="teacher_kl"))
    assert streamed.importance == whole.importance


def test_tasks_that_read_are_streamed_and_those_that_write_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", tied=False)
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7 w8", "prompt": "w5", "target": "w6"}\n' * 3)
    data = str(tmp_path / "text.jsonl")
    whole, streamed = both_ways(folder, ScoreConfig(), tasks=make_tasks([TaskConfig(kind="perplexity", data=data)]))
    assert streamed.importance == whole.importance and streamed.evaluations == whole.evaluations
    files, tokenizer = load_streamed(folder, device="cpu")
    writing = make_tasks([TaskConfig(kind="generate", data=data)])
    with pytest.raises(InputError, match="task generate generates text, for which every layer would be read"):
        score_layers(LayerwiseModel(files.model, files.weights_loaded), tokenizer, ScoreConfig(), tasks=writing)


def test_no_more_than_two_layers_are_ever_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = load_streamed(save_tiny(tmp_path), device="cpu")
    layers, read, most = LayerwiseModel(files.model).layers, StreamedLayers._read, [0]
    assert all(p.device.type == "meta" for layer in layers for p in layer.parameters())

    @contextmanager
    def counted(position: int) -> Iterator[None]:
        with files.weights_loaded(position):
            here = sum(p.device.type != "meta" for layer in layers for p in layer.parameters())
            most[0] = max(most[0], here // len(list(layers[0].parameters())) + len(files._read_ahead))
            yield

    reads: list[int] = []
    monkeypatch.setattr(
        StreamedLayers,
        "_read",
        lambda self, position, *before: (reads.append(position), read(self, position, *before))[1],
    )
    layerwise = LayerwiseModel(files.model, counted)
    for _ in range(2):
        layerwise.forward_with_skips(tiny_ids(), [1, 2])
    files._read_ahead[0].result()
    assert most[0] == 2
    assert reads == [*range(6), *range(6), 0]  # each layer once a walk, and the first for the next walk
    assert all(p.device.type == "meta" for layer in layers for p in layer.parameters())


def test_what_was_read_ahead_is_dropped(tmp_path: Path) -> None:
    files, _ = load_streamed(save_tiny(tmp_path), device="cpu")
    layerwise = LayerwiseModel(files.model, files.weights_loaded, files.drop_read_ahead)
    expected = layerwise.forward_with_skips(tiny_ids())
    assert list(files._read_ahead) == [0]
    layerwise.drop_read_ahead()
    assert not files._read_ahead
    assert torch.equal(layerwise.forward_with_skips(tiny_ids()), expected)


class Event:
    """An event on a GPU that is not there: it happens when the test says so."""

    made: ClassVar[list[Event]] = []

    def __init__(self) -> None:
        self.is_waited_for, self.happened = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.is_waited_for.set()
        assert self.happened.wait(60)


class Stream:
    """A stream of that GPU; those of the test's thread, where layers run, are noted."""

    def __init__(self, *_: Any) -> None: ...

    def wait_event(self, event: Event) -> None:
        """The host does not wait."""

    def record_event(self) -> Event:
        event = Event()
        if threading.current_thread() is threading.main_thread():
            Event.made.append(event)
        return event


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamedLayers, list[Any]]:
    """Layers that are read for the second of two GPUs, which are not there; and what its reader does."""
    done: list[Any] = []
    files, _ = load_streamed(save_tiny(tmp_path), device="cpu")
    read_tensors, to = streaming.read_tensors, torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append((threading.current_thread(), device)))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(streaming, "read_tensors", lambda *arguments, pinned: read_tensors(*arguments))

    def copied(value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if options.get("non_blocking"):
            done.append("copy")
        return to(value, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(Event, "made", [])
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "device", torch.device("cuda", 1))
        return StreamedLayers(files.model, files._files, files._dtypes, tmp_path), done


def test_a_gpu_gets_no_layer_before_it_has_come_to_the_one_before_it(
    on_gpu: tuple[StreamedLayers, list[Any]],
) -> None:
    """So that those in its memory are two, though the host is ahead of it."""
    files, done = on_gpu
    tensors = len(files._names(0))
    for position in range(6):
        with files.weights_loaded(position):
            here = Event.made[position]
            assert here.is_waited_for.wait(60)
            assert done.count("copy") == (position + 1) * tensors
        assert done.count("copy") == (position + 1) * tensors
        here.happened.set()
    files._read_ahead[0].result()
    assert done.count("copy") == 7 * tensors


def test_the_thread_that_reads_for_a_gpu_uses_no_other(on_gpu: tuple[StreamedLayers, list[Any]]) -> None:
    files, done = on_gpu
    with files.weights_loaded(0):
        Event.made[0].happened.set()
    files._read_ahead[1].result()
    thread, device = done[0]
    assert device == torch.device("cuda", 1) and thread in files._reader._threads
    assert set(done[1:]) == {"copy"}


def rewrite(folder: Path, rename: dict[str, str | None]) -> None:
    """Renames tensors of a checkpoint in one file, or takes them out."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(path).items():
        if new := rename.get(name, name):
            tensors[new] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_said_of_checkpoints_that_cannot_be_streamed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a")
    rewrite(folder, {"model.layers.2.mlp.up_proj.weight": None})
    with pytest.raises(InputError, match=r"the checkpoint lacks weights of its model: model\.layers\.2\.mlp\.up_proj"):
        load_streamed(folder, device="cpu")
    folder = saved(tmp_path / "c", "gpt2", tied=True)
    names = load_file(folder / "model.safetensors")
    rewrite(folder, {name: name.removeprefix("transformer.") for name in names})  # as GPT-2 was published
    load_model(folder, device="cpu")
    with pytest.raises(InputError, match=r"its parts cannot be read on their own: .* no tensor "):
        load_streamed(folder, device="cpu")
    folder = save_tiny(tmp_path / "b")
    rewrite(folder, {"model.norm.weight": None})
    with pytest.raises(InputError, match=r"the checkpoint lacks weights of its model: model\.norm\.weight"):
        load_streamed(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no file named model.safetensors"):
        load_streamed(folder, device="cpu")
