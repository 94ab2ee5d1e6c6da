"""The public names, each imported from its home when it is first asked for.

Torch and transformers take seconds to import, and most commands need few of the rooms. `__init__.pyi` says the same to
type checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "Run": "layerpeel.run.folder",
    "RunConfig": "layerpeel.config.run",
    "distill": "layerpeel.training.rounds",
    "evaluate": "layerpeel.tasks.evaluation",
    "load_model": "layerpeel.model.loading",
    "peel": "layerpeel.run.loop",
    "remove_layers": "layerpeel.model.surgery",
    "repair": "layerpeel.training.rounds",
    "score_layers": "layerpeel.importance.scoring",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'layerpeel' has no attribute '{name}'")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
