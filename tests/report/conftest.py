"""A finished run of a tiny teacher, made once, with names and texts in it that would like to be markup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from layerpeel.config.reading import parse_config
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from tests.families import save_tiny

HOSTILE = "</style><script>document.title='owned'</script>|`x`$\\frac$\u202e\x07<img src=x onerror=alert(1)>"
CARD = "---\nlicense: other\nlicense_name: tiny-licence\nlanguage: [en, ru]\n---\n# A teacher\n"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from 6 layers to 4, with a last pass; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    (save_tiny(folder / "teacher") / "README.md").write_text(CARD)
    (folder / "text.jsonl").write_text(json.dumps({"text": "w5 w9 w7 w8 w4 w6 " * 12}) + "\n")
    rows = [{"prompt": f"w{5 + i} w9", "target": "w7 w8"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    peel(
        parse_config(
            {
                "teacher": str(folder / "teacher"),
                "output": str(folder / "run"),
                "stop": {"target_layers": 4},
                "score": {"decide": "block_influence", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 64},
                "tasks": [
                    {"kind": "perplexity", "name": "=ppl", "data": str(folder / "text.jsonl")},
                    {"kind": "generate", "name": HOSTILE, "data": str(folder / "rows.jsonl"), "metric": "copy"},
                ],
                "distill": {
                    "text": str(folder / "text.jsonl"),
                    "tokens_per_round": 128,
                    "tokens_per_step": 32,
                    "sequence_length": 16,
                    "last_pass": {"tokens": 96},
                },
            },
            "test",
        )
    )
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy of it to work on; the teacher is where it was."""
    folder = shutil.copytree(finished, tmp_path / "run")
    return Run(folder)
