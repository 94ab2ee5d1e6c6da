"""A tokenizer that can be checked by eye, and sources of a few texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from layerpeel.config.fields import TextConfig
from tests.families import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., TextConfig]:
    """A source of these rows (a str is a row with a text), in their order if nothing else is said."""

    def make(rows: list[str | dict[str, Any]], **options: Any) -> TextConfig:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in rows))
        return TextConfig(path=str(path), **{"shuffle": 0, **options})

    return make
