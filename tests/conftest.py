"""What every test stands on: no network, few threads, one seed; and the kit, where there is one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

from tests.quick import measure_quickly

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# Models are slow to start and CI machines differ: examples are the same on all of them, and none is timed.
hypothesis.settings.register_profile("layerpeel", deadline=None, derandomize=True)
hypothesis.settings.load_profile("layerpeel")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for each test, whichever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kit() -> Path:
    """The folder of models and texts beside the repository; a test that asks for it is marked `kit`.

    Skips where there is none; on a CI machine that has the folder around it, its absence is a fault.
    """
    folder = SHARED / "kit"
    if not folder.is_dir():
        if SHARED.is_dir() and os.environ.get("CI", "").lower() == "true":
            pytest.fail("../shared is here, but ../shared/kit is not: the tests that need it would all be skipped")
        pytest.skip("needs ../shared/kit, the folder of models and texts beside the repository")
    return folder


@pytest.fixture
def quick_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and plans measure for a moment."""
    measure_quickly(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what asks for the kit, and skips `gpu` tests without a GPU."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "kit" in getattr(item, "fixturenames", ()):
            item.add_marker("kit")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
