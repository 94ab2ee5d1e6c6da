"""The bundled teacher and the small world that it was trained on, ready to run."""

from __future__ import annotations

from pathlib import Path

import yaml

from layerpeel.demo.world import World, write_world

TEACHER = Path(__file__).parent / "teacher"
TASK_LIMIT = 100


def prepare_demo(folder: Path) -> Path:
    """Writes the small world's text and tasks, and the config of the demo run, into `folder`; gives the config."""
    write_world(folder / "world")
    config = folder / "demo.yaml"
    config.write_text(yaml.safe_dump(demo_config(folder), sort_keys=False), encoding="utf-8")
    return config


def demo_config(folder: Path) -> dict[str, object]:
    """12 layers to 8, scored by the small world's seven skills."""
    return {
        "teacher": str(TEACHER),
        "output": str(folder / "run"),
        "stop": {"target_layers": 8},
        "score": {"decide": "task_quality", "shortlist": {"by": "teacher_kl", "keep": 4}, "tokens": 4096},
        "tasks": [_task(name) for name in World().skills()],
        "distill": {
            "text": "world/text.jsonl",
            "tokens_per_round": 40_000,
            "sequence_length": 96,
            "train": "all",
            "learning_rate": 1e-3,
        },
    }


def _task(name: str) -> dict[str, object]:
    task = {"name": name, "data": f"world/tasks/{name}.jsonl", "limit": TASK_LIMIT}
    if name.startswith("knowledge"):
        return task | {"kind": "choice"}
    metric = "copy" if name.startswith("copy") else "rougeL"
    return task | {"kind": "generate", "metric": metric}
