"""A GPU that is not there (`device.py`): the same numbers as on the CPU, no tensor in the wrong place, few waits.

All of it runs once, in a process of its own, because torch knows such a device from then on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.names import CASES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Of the work counted in `runs.py` (a Llama of 6 layers): what was measured, and some room.
CEILINGS = {
    "step": {"launches": 980, "syncs": 8, "copies": 7},
    "batch": {"launches": 320, "syncs": 4, "copies": 6},
    "token": {"launches": 285, "syncs": 2, "copies": 0},
    "stream": {"launches": 310, "syncs": 1, "copies": 55},  # 9 tensors of each layer, and the tokens
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fake_cuda")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.runs", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert not done.returncode, done.stderr[-9000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_gpu_gives_the_numbers_of_a_cpu(results: Any, family: str, dtype: str) -> None:
    run = results[f"{family} {dtype}"]
    assert "traceback" not in run, run["traceback"]
    cpu, cuda = run["cpu"], run["cuda"]
    rel, absolute = (1e-4, 1e-6) if dtype == "float32" else (0.02, 2e-3)
    assert cuda["switches"] == cpu["switches"] == [family != "qwen3_next"] * 2  # prefix trees, and packing
    assert cuda["importance"] == pytest.approx(cpu["importance"], rel=rel, abs=absolute)
    assert cuda["losses"] == pytest.approx(cpu["losses"], rel=rel)
    assert cuda["scores"]["perplexity"] == pytest.approx(cpu["scores"]["perplexity"], rel=rel)
    if dtype == "float32":  # in bfloat16 two logits may be equal, and another text be the greedy one
        assert cuda["texts"] == cpu["texts"]
        assert cuda["scores"]["generate"] == pytest.approx(cpu["scores"]["generate"])


def test_devices_do_not_mix(results: Any) -> None:
    errors = dict(results["mixed"])
    assert "to numpy" in errors.pop("numpy") and "cannot be a tensor on cpu" in errors.pop("data")
    for name, error in errors.items():
        assert "found at least two devices, cuda:0 and cpu" in error, name


@pytest.mark.parametrize("work", CEILINGS)
def test_work_takes_no_more_launches_waits_and_copies(results: Any, work: str) -> None:
    assert "traceback" not in results[work], results[work]["traceback"]
    assert results[work]["launches"] > 100
    assert {name: results[work][name] for name, most in CEILINGS[work].items() if results[work][name] > most} == {}


@pytest.mark.parametrize(
    "fault", ["labels on the CPU", "loss vector on the CPU", "positions on the CPU", "masks on the CPU"]
)
def test_a_tensor_left_on_the_cpu_is_noticed(results: Any, fault: str) -> None:
    assert "found at least two devices, cuda:0 and cpu" in results[fault].get("error", ""), results[fault]


def test_reading_in_a_hot_loop_is_noticed(results: Any) -> None:
    assert "can't convert cuda:0 device type tensor to numpy" in results["numpy in a hot loop"]["error"]
    assert results["item in a hot loop"]["syncs"] > CEILINGS["step"]["syncs"]


def test_streamed_layers_come_from_pinned_memory_and_give_the_same_numbers(results: Any) -> None:
    stream = results["stream"]
    assert stream["pinned"] == stream["copies"] - 1 == 54
    assert stream["streamed"] == stream["in memory"] and len(stream["streamed"]) == 2 * 3 * 17 * 32


def test_a_run_whose_layers_are_streamed_to_a_gpu_is_that_on_a_cpu(results: Any) -> None:
    run = results["streamed run"]
    assert "traceback" not in run, run["traceback"]
    assert run["cuda"].keys() == run["cpu"].keys()
    for name, values in run["cpu"].items():
        assert values and run["cuda"][name] == pytest.approx(values, rel=1e-3, abs=1e-6), name


def test_a_float32_checkpoint_on_a_gpu_is_warned_of(results: Any) -> None:
    said = " ".join(results["stream"]["said"].split())
    assert "is stored in float32, in which a GPU is several times slower and takes twice the memory" in said
    assert "set dtype: bfloat16" in said
