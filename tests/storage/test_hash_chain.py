"""Sealed lines: any byte that is not as it was written is found; and one process at a time claims the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerpeel.errors import RunError
from layerpeel.storage.hash_chain import append, checksum, cut_torn_line, read_events, to_line
from layerpeel.storage.lock import claim, is_claimed

EVENTS = [{"event": "start", "n": 1.5e-7}, {"event": "round", "name": "č\u2028"}, {"event": "finish", "files": {}}]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path, before = tmp_path / "journal.jsonl", ""
    for event in EVENTS:
        before = checksum(event, before)
        append(path, to_line(event | {"checksum": before}))
    return path


def test_what_was_written_is_read(journal: Path) -> None:
    assert [{k: v for k, v in event.items() if k != "checksum"} for event in read_events(journal)] == EVENTS


def test_every_flipped_bit_and_every_cut_is_found_or_only_loses_the_last_line(journal: Path) -> None:
    content, whole = journal.read_bytes(), read_events(journal)
    for place in range(len(content)):
        for bit in range(8):
            journal.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            line = content[:place].count(b"\n") + 1
            if place == len(content) - 1:
                assert read_events(journal) == whole[:2]  # without its end the last line is a torn one
                continue
            with pytest.raises(RunError, match=rf"journal\.jsonl: damaged at line {line}") as error:
                read_events(journal)
            assert f"the first {line - 1}" in str(error.value.hint)
        journal.write_bytes(content[:place])
        assert read_events(journal) == whole[: content[:place].count(b"\n")]


def test_lines_that_were_swapped_or_left_out_are_found(journal: Path) -> None:
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    for lines in ([first, third], [second, first, third], [first, first, second]):
        journal.write_bytes(b"".join(lines))
        with pytest.raises(RunError, match="damaged at line"):
            read_events(journal)


def test_a_torn_line_is_cut(journal: Path) -> None:
    content = journal.read_bytes()
    append(journal, b'{"event": "rou')
    cut_torn_line(journal)
    assert journal.read_bytes() == content


def test_a_file_is_claimed_once(journal: Path) -> None:
    with claim(journal) as granted:
        assert granted and is_claimed(journal)
        with claim(journal) as again:
            assert not again
    assert not is_claimed(journal)
    with claim(journal) as granted:
        assert granted
