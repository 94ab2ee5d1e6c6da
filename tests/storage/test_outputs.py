"""Outputs are tried before the work: what cannot be written to is refused, and the working folder can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerpeel.errors import InputError
from layerpeel.storage.files import partial_of, replace_folder, write_folder
from layerpeel.storage.outputs import beside, check_space, try_folder, windows_hint


def test_a_try_leaves_nothing(tmp_path: Path) -> None:
    try_folder(tmp_path / "a/b/c")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "hint"), [(28, "free some space"), (30, "another folder"), (13, "permissions")])
def test_what_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", refuse)  # as full, read-only and foreign disks do
    with pytest.raises(InputError, match=rf"nothing can be written in .*\({os.strerror(error)}\)") as caught:
        try_folder(tmp_path / "run")
    assert hint in str(caught.value.hint) and not any(tmp_path.iterdir())


def test_a_name_that_is_too_long_for_what_is_written_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be a folder \(File name too long\)"):
        try_folder(tmp_path / ("x" * 250))


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    check_space(tmp_path / "new", 1, "the student")
    with pytest.raises(InputError, match=r"no space left on the disk of .*: the student takes 1,000,000,000,000,000"):
        check_space(tmp_path / "new", 10**15, "the student")


@pytest.mark.parametrize("name", [".", "../out", "out"])
def test_a_folder_is_written_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if name != "out" else tmp_path)
    before = os.stat(tmp_path / "out").st_ino

    def write(folder: Path) -> None:
        assert folder.parent == tmp_path / "out"  # an empty folder stays: it may be the working folder, or a disk
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()

    write_folder(Path(name), write)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "sub"}
    assert os.stat(tmp_path / "out").st_ino == before


def test_a_folder_that_holds_something_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old").touch()
    partial = partial_of(folder)
    partial.mkdir()
    (partial / "new").touch()
    replace_folder(partial, folder)
    assert [path.name for path in folder.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_a_folder_beside_the_working_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert beside(Path("x/run"), "-score") == Path("x/run-score")
    assert beside(Path("."), "-score") == tmp_path / "run-score"
    monkeypatch.chdir(tmp_path / "run/a")
    assert beside(Path(".."), "-score") == tmp_path / "run-score"


@pytest.mark.skipif(os.name == "nt", reason="there they are paths")
def test_windows_paths_are_told() -> None:
    for path in (r"C:\models\x", "D:/x", r"\\server\x", "C:\new"):  # the last as YAML's double quotes make it
        assert windows_hint(path)
    assert not windows_hint("org/model") and not windows_hint("a:b")


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "student")
    partial.mkdir()
    (partial / "half").touch()
    write_folder(tmp_path / "student", lambda folder: (folder / "config.json").touch())
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["config.json"] and not partial.exists()
