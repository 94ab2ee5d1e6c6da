"""Answers kept on disk, so that a scoring that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpeel.inference.requests import Answer, Likelihood, Request
from layerpeel.storage.hash_chain import append, checksum, from_line, to_line

Answers = list[list[Answer]]


class AnswerCache:
    """A file of answers, found again by what was asked.

    Args:
        path: a file; its folder is made.
        asked_of: says which model is asked. What a file holds of another is dropped, and so are damaged lines.
    """

    def __init__(self, path: Path, asked_of: str) -> None:
        self.path, self.asked_of = path, asked_of
        self._known: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        events = [event for line in lines if (event := from_line(line, asked_of))]
        self._known = {event["key"]: event["answers"] for event in events}
        if not events:
            path.unlink(missing_ok=True)
        elif not lines[-1].endswith(b"\n"):
            append(path, b"\n", each_process=True)

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
        event: dict[str, Any] = {"key": _key(asked), "answers": value}
        append(self.path, to_line(event | {"checksum": checksum(event, self.asked_of)}), each_process=True)


def _key(asked: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(asked).encode()).hexdigest()
