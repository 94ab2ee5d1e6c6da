"""Answers kept on disk, so that a scoring that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpeel.tasks.base import Answer, Likelihood, Request

Answers = list[list[Answer]]


class AnswerStore:
    """A file of answers, found again by what was asked.

    Args:
        path: a file; its folder is made.
        asked_of: says which model is asked. What a file holds of another is dropped.
    """

    def __init__(self, path: Path, asked_of: str) -> None:
        self.path, self.asked_of = path, asked_of
        self._known: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        events = [event for line in lines if line.endswith(b"\n") and (event := _parse(line))]
        if events and events[0].get("asked_of") == asked_of:
            self._known = {event["key"]: event["answers"] for event in events[1:]}
        else:
            path.write_text(json.dumps({"asked_of": asked_of}) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._known)

    def find(self, requests: Sequence[Request], candidates: Sequence[int]) -> Answers | None:
        """The answers to these requests with these candidates, [requests][1 + C], if they were given before."""
        found = self.find_value(list(candidates), list(requests))
        return found and [[Likelihood(*a) if isinstance(a, list) else a for a in own] for own in found]

    def keep(self, requests: Sequence[Request], candidates: Sequence[int], answers: Answers) -> None:
        """Writes answers down; returns once they are on the disk."""
        self.keep_value(answers, list(candidates), list(requests))

    def find_value(self, *asked: Any) -> Any:
        """What was kept of a question, told by what it prints as; None if nothing was."""
        return self._known.get(_key(asked))

    def keep_value(self, value: Any, *asked: Any) -> None:
        """Writes a value down that JSON can hold; returns once it is on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn() + json.dumps({"key": _key(asked), "answers": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _torn(self) -> bool:
        """Whether a crash has left a line without its end."""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def _key(asked: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
