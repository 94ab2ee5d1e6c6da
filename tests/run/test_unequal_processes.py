"""A run in two processes (gloo) with different memory, under FSDP2, that generates, tracks and reports: that of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerpeel.cli.process import main
from layerpeel.config.reading import load_config
from layerpeel.inference import budget
from layerpeel.processes.distributed import RANK
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from tests.families import save_texts, save_tiny, tiny_texts
from tests.training.test_parallel import launch

FREE = [2**30, 2**21]  # bytes, of which each process thinks that it has them


@pytest.mark.slow
def test_processes_with_different_memory_make_the_run_of_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    text = save_texts(tmp_path / "text.jsonl", tiny_texts(3 + 11 * line % 28 for line in range(40)))
    task = {"data": str(text), "limit": 20}
    write = {"prompt": "{text}", "target": "{text}", "metric": "copy", "max_new_tokens": 5}
    config: dict[str, Any] = {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "one"),
        "stop": {"target_layers": 5},
        "score": {"protect": {"first": 2}},
        "tasks": [{"kind": "perplexity", **task}, {"kind": "generate", **task, **write}],
        "distill": {"text": str(text), "tokens_per_round": 0, "sequence_length": 24},
        "trackers": ["tensorboard"],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    alone = peel(load_config(tmp_path / "run.yaml"))
    two = tmp_path / "two"
    launch("-m", "tests.run.test_unequal_processes", str(tmp_path / "run.yaml"), f"output={two}", fsdp=True)
    both = Run(two)
    assert alone.teacher and both.teacher and both.teacher.attention == alone.teacher.attention == "sdpa"
    for one, other in ((alone.teacher, both.teacher), (alone.rounds[0].end, both.rounds[0].end)):
        assert other.evaluation.scores.keys() == {"perplexity", "generate"}
        for name, score in one.evaluation.scores.items():
            assert other.evaluation.scores[name].value == pytest.approx(score.value, rel=1e-6)
    assert both.rounds[0].scores.importance == pytest.approx(alone.rounds[0].scores.importance, abs=1e-6)
    measured = json.loads((two / "report" / "measurements.json").read_text())
    assert set(measured["depths"]) == {"0", "1"} and measured["samples"]
    assert list(two.rglob("events.out.tfevents*"))


if __name__ == "__main__":
    budget._free_bytes = lambda device: FREE[RANK]
    sys.argv = ["layerpeel", "run", sys.argv[1], "--set", sys.argv[2]]
    main()
