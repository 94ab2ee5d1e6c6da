"""A config of a tiny teacher that studies start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.families import save_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config's path; 6 layers, two tasks."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "teacher")
    (folder / "text.jsonl").write_text(json.dumps({"text": "w5 w9 w7 w8 w4 w6 " * 6}) + "\n")
    rows = [{"context": f"w{5 + i} w9", "choices": ["w7", "w8"], "answer": i % 2} for i in range(6)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "teacher": "teacher",
        "output": "unused",
        "stop": {"target_layers": 5},
        "score": {"decide": "task_quality", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 32},
        "tasks": [{"kind": "choice", "data": "choice.jsonl"}, {"kind": "perplexity", "data": "text.jsonl"}],
        "distill": {"text": "text.jsonl", "sequence_length": 16, "tokens_per_step": 32},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder / "base.yaml"
