"""Answers kept on disk, so that an interrupted scoring resumes where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpeel.inference.requests import Answer, Likelihood, Request
from layerpeel.storage.hash_chain import append, checksum, from_line, to_line

Answers = list[list[Answer]]


class AnswerCache:
    """Answers in a JSONL file, looked up by the requests that they answer.

    Args:
        path: the file; its folder is made.
        model_id: which model answers; part of each line's checksum. Lines of other models and damaged lines are
            dropped.
    """

    def __init__(self, path: Path, model_id: str) -> None:
        self.path, self.model_id = path, model_id
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        events = [event for line in lines if (event := from_line(line, model_id))]
        self._values: dict[str, Any] = {event["key"]: event["answers"] for event in events}
        if not events:
            path.unlink(missing_ok=True)
        elif not lines[-1].endswith(b"\n"):
            append(path, b"\n", each_process=True)

    def __len__(self) -> int:
        return len(self._values)

    def find(self, requests: Sequence[Request], candidates: Sequence[int]) -> Answers | None:
        """The cached answers to these requests with these candidates skipped, [requests][1 + C]; None if not cached."""
        rows = self.find_value(list(candidates), list(requests))
        return rows and [[Likelihood(*a) if isinstance(a, list) else a for a in answers] for answers in rows]

    def keep(self, requests: Sequence[Request], candidates: Sequence[int], answers: Answers) -> None:
        """Writes answers; returns once they are on the disk."""
        self.keep_value(answers, list(candidates), list(requests))

    def find_value(self, *request_key: Any) -> Any:
        """The value kept under a key, which is compared by its `repr`; None if there is none."""
        return self._values.get(_digest(request_key))

    def keep_value(self, value: Any, *request_key: Any) -> None:
        """Writes a value that JSON can hold; returns once it is on the disk."""
        event: dict[str, Any] = {"key": _digest(request_key), "answers": value}
        append(self.path, to_line(event | {"checksum": checksum(event, self.model_id)}), each_process=True)


def _digest(request_key: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(request_key).encode()).hexdigest()
