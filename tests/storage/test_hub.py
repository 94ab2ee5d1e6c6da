"""Without the hub, what was fetched from it before is used, and nothing is tried again and again; here, no host is."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from layerpeel.data.reading import read_rows
from layerpeel.errors import InputError
from layerpeel.model.loading import load_config_of, load_model
from layerpeel.plan.quality import harness_measures
from layerpeel.processes.progress import print_once
from layerpeel.storage import hub
from layerpeel.storage.hub import is_hub_name, use_cache_without_hub
from layerpeel.tasks import harness_loading
from tests.families import save_tiny, tiny_tokenizer
from tests.model.test_commits import FIRST, NAME, add_commit, use_cache


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A hub that refuses connections, and an empty cache; gives the seconds that anything waited since."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        for name, module in (("HF_HUB_OFFLINE", constants), ("HF_HUB_OFFLINE", datasets.config)):
            monkeypatch.setattr(module, name, False)
        _use_endpoint(monkeypatch, taken.getsockname()[1])
        use_cache(tmp_path / "cache", monkeypatch)
        waited: list[float] = []
        monkeypatch.setattr(time, "sleep", waited.append)
        monkeypatch.setattr(hub, "_offline_here", [])
        _forget()
        yield waited
    _forget()


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(module, name, f"http://127.0.0.1:{port}")


def _forget() -> None:
    hub._why_unreachable.cache_clear()
    print_once.cache_clear()
    close_session()


def test_a_model_that_was_never_fetched(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no such model: someone/tiny is neither a folder here nor a model that can"):
        load_config_of(NAME)
    said = " ".join(capsys.readouterr().err.split())
    assert f"the hub cannot be reached ({constants.ENDPOINT}: [Errno 111] Connection refused): what was" in said
    assert not waits


def test_a_model_that_was_fetched_before(waits: list[float], tmp_path: Path) -> None:
    add_commit(tmp_path / "cache", FIRST, save_tiny(tmp_path / "tiny"), "main")
    model, _ = load_model(NAME, device="cpu")
    assert model.config.model_type == "llama" and not waits


def test_text_of_the_hub(waits: list[float]) -> None:
    with pytest.raises(InputError, match="someone/text: neither a file here nor a dataset that can be loaded"):
        next(read_rows("someone/text"))
    assert not waits


def test_tasks_of_the_harness(
    waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "piqa", "dataset_path": "baber/piqa", "test_split": "validation", "output_type": "multiple_choice"}
    (tmp_path / "piqa.yaml").write_text(yaml.safe_dump(task))
    index = harness_loading._manager(str(tmp_path), defaults=False)
    monkeypatch.setattr(harness_loading, "_manager", lambda folder, defaults: index)  # that of all tasks takes seconds
    measures, missing = harness_measures(1000, tiny_tokenizer())
    assert not measures and missing
    assert missing.startswith("task piqa: piqa: its data or definition cannot be loaded (Couldn't reach 'baber/piqa'")
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert not waits


def test_once_the_hub_answers_it_is_asked_again(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache_without_hub()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers that it knows no HEAD
        _use_endpoint(monkeypatch, server.server_port)
        Thread(target=server.handle_request, daemon=True).start()
        use_cache_without_hub()
        assert constants.HF_HUB_OFFLINE  # for a minute it is not tried
        hub._why_unreachable.cache_clear()
        use_cache_without_hub()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_an_offline_mode_that_was_asked_for_stays(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    use_cache_without_hub()
    assert constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE and not capsys.readouterr().err


def test_so_does_that_of_datasets_alone(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    use_cache_without_hub()
    hub._set_offline(False)
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("path", "expected"),
    [("someone/tiny", True), ("gpt2", True), ("/models/tiny", False), ("a/b/c", False), ("./tiny", False)],
)
def test_names_of_the_hub(path: str, expected: bool) -> None:
    assert is_hub_name(path) == expected


def test_a_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("gpt2")
