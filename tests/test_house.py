"""The rules of the house, kept by reading its source (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "layerpeel"

# A room is a module, or a package with all in it. Each may import those before it, and none after.

ROOMS = [
    "errors",
    "processes",
    "storage",
    "config",
    "model",
    "data",
    "inference",
    "tasks",
    "importance",
    "losses",
    "training",
    "run",
    "report",
    "plan",
    "export",
    "demo",
    "study",
    "cli",
    "__main__",
]


PUBLIC = {"RunConfig", "peel", "score_layers", "remove_layers", "distill", "evaluate", "load_model", "Run"}

MODULES = sorted(PACKAGE.rglob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of what a module imports from layerpeel, wherever in the module that stands."""
    package = ("layerpeel", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "layerpeel")


def imports_against_the_order(path: Path, source: str) -> list[str]:
    """What a module imports from a later room, or from the package itself, which imports nearly all rooms."""
    room, faults = room_of(path), []
    for line, name in imported(path, source):
        other = f"{name}.".split(".")[1]
        if other not in ROOMS:
            faults.append(f"line {line}: {name} is in no room; import from the module that defines it")
        elif ROOMS.index(other) > ROOMS.index(room):
            faults.append(f"line {line}: {name}, though {other} comes after {room}")
    return faults


def mentions_model_type(node: ast.expr) -> bool:
    """Whether an expression reads `model_type`, as a name, an attribute, a key or an argument."""
    return any(
        getattr(part, field, None) == "model_type" for part in ast.walk(node) for field in ("id", "attr", "value")
    )


def family_conditions(source: str) -> list[int]:
    """Lines that compare or match on `model_type`."""
    return [
        node.lineno if isinstance(node, ast.Compare) else node.subject.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Compare) and any(map(mentions_model_type, [node.left, *node.comparators])))
        or (isinstance(node, ast.Match) and mentions_model_type(node.subject))
    ]


UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")),
    "torch.load",
    "eval",
    "exec",
}


def unsafe(source: str) -> list[str]:
    """Lines that run code found in data: unpickling, YAML tags, `eval`, `exec`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            continue
        found += [
            f"line {node.lineno}: {name}"
            for name in names
            if name in UNSAFE_CALLS or name.split(".")[0] in UNSAFE_MODULES
        ]
    return found


def lines_of_code(source: str) -> int:
    """Lines that hold neither only a comment, nor a docstring, nor an import."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.stmt)
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_there_are_modules() -> None:
    assert MODULES, f"no modules under {PACKAGE}: the rules below would hold of nothing"


@every_module
def test_every_module_is_in_a_room(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS or room == "__init__", f"{room} has no place in the order of imports; give it one in ROOMS"


@every_module
def test_imports_run_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the front door imports what it shows
    assert room_of(path) in ROOMS
    assert imports_against_the_order(path, path.read_text(encoding="utf-8")) == []


@every_module
def test_model_families_are_known_in_one_place(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[:1] != ("model",):
        assert family_conditions(path.read_text(encoding="utf-8")) == []


@every_module
def test_nothing_runs_code_found_in_data(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


def test_the_loop_fits_on_one_screen() -> None:
    source = (PACKAGE / "run" / "loop.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    assert lines_of_code(source) < 80


def test_the_public_face_is_eight_names() -> None:
    layerpeel = importlib.import_module("layerpeel")
    assert len(layerpeel.__all__) == len(PUBLIC)
    assert set(layerpeel.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_can_be_imported(name: str) -> None:
    assert callable(getattr(importlib.import_module("layerpeel"), name))


HOME_PATH = re.compile(r"(?<![A-Za-z0-9_.])(?:/(?:home|root|Users)/|[A-Za-z]:\\+Users\\)")


def test_no_file_holds_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout, to know which files are the repository's")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert ROOT / "pyproject.toml" in files
    contents = {path: path.read_bytes() for path in files if path.is_file()}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, content in contents.items()
        if b"\0" not in content[:8192]
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1)
        if HOME_PATH.search(line)
    ]
    assert found == []


# The rules would hold of anything if their readers saw nothing.


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("from layerpeel.config import RunConfig\nfrom layerpeel.tasks.base import Task\nimport torch", 0),
        ("from layerpeel.tasks.registry import choice\nfrom . import pairs\nfrom .. import errors", 0),
        ("from layerpeel.run.loop import peel", 1),
        ("import layerpeel.run.loop as loop", 1),
        ("from layerpeel import run", 1),
        ("from .. import run", 1),
        ("from ..run.loop import peel", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from layerpeel.run.loop import peel", 1),
        ("def late():\n    from layerpeel.run.loop import peel", 1),
        ("from layerpeel import peel", 1),
        ("import layerpeel", 1),
        ("from layerpeel.nowhere import thing", 1),
    ],
)
def test_the_order_of_imports_is_seen(source: str, faults: int) -> None:
    assert len(imports_against_the_order(PACKAGE / "tasks" / "some.py", source)) == faults


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("if config.model_type == 'llama': pass", [1]),
        ("x = 1\nif 'gemma' in config.model_type: pass", [2]),
        ("if model_type in {'llama', 'qwen2'}: pass", [1]),
        ("if config['model_type'] != 'llama': pass", [1]),
        ("if getattr(config, 'model_type', '').lower() == 'llama': pass", [1]),
        ("match config.model_type:\n    case 'llama': pass", [1]),
        ("print(config.model_type)", []),
        ("if config.model == 'model': pass", []),
    ],
)
def test_family_conditions_are_seen(source: str, lines: list[int]) -> None:
    assert family_conditions(source) == lines


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from torch import load", 1),
        ("torch.load(path, weights_only=True)", 1),
        ("yaml.load(text, Loader=yaml.SafeLoader)", 1),
        ("eval(text)\nexec(text)", 2),
        ("model.eval()\nyaml.safe_load(text)\ncompile_pattern = re.compile", 0),
    ],
)
def test_unsafe_calls_are_seen(source: str, count: int) -> None:
    assert len(unsafe(source)) == count


def test_lines_of_code_are_counted() -> None:
    assert (
        lines_of_code('"""Text\nof two lines."""\n\nimport os\n\n# why\nx = (\n    1,\n)\ny = """a\nb"""  # z\n') == 5
    )


def test_home_paths_are_seen() -> None:
    for folder in ("home", "root", "Users"):
        assert HOME_PATH.search(f"data: /{folder}/someone")
        assert HOME_PATH.search(f'"/{folder}/someone"')
    assert not HOME_PATH.search("see docs/home/index.html")
