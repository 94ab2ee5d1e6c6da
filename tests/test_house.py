"""The rules of the house, kept by reading its source (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerpeel.model.families import FAMILIES, REFUSED

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
    "_front_door",
    "cli",
    "__main__",
]


MOST_ROOMS = 18
MOST_MODULE_LINES = 300
MOST_FUNCTION_LINES = 45

PUBLIC = {"RunConfig", "peel", "score_layers", "remove_layers", "distill", "evaluate", "load_model", "Run"} | {"repair"}

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


def family_names(source: str) -> list[str]:
    """Names of model families among a module's strings."""
    return [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*FAMILIES, *REFUSED}
    ]


def family_conditions(source: str) -> list[int]:
    """Lines that compare or match on `model_type`."""
    return [
        node.lineno if isinstance(node, ast.Compare) else node.subject.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Compare) and any(map(mentions_model_type, [node.left, *node.comparators])))
        or (isinstance(node, ast.Match) and mentions_model_type(node.subject))
    ]


# Names that say nothing of the value: call it by what it holds.
VAGUE_NAMES = {
    *("own", "ours", "theirs", "mine", "its", "here", "there", "found", "known", "said", "whole", "few"),
}


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names that a node gives to values: variables, attributes, parameters, fields, functions and captures."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield name
        case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name


def vague_names(source: str) -> list[str]:
    """Values that are called by a word that says nothing of them."""
    return [
        f"line {getattr(node, 'lineno', 0)}: {name}"
        for node in ast.walk(ast.parse(source))
        for name in bound_names(node)
        if name.strip("_") in VAGUE_NAMES
    ]


def long_functions(source: str) -> list[str]:
    """Functions of more than MOST_FUNCTION_LINES lines, docstring and signature included."""
    return [
        f"line {node.lineno}: {node.name} has {lines} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]


# What a run's events hold; outside of the modules that read and write their JSON they are attributes.
RECORD_FIELDS = {
    *("kept_quality", "evaluation", "evaluations", "training", "removed", "scores", "importance", "aggregate"),
}
RECORD_JSON = {Path("run/record.py"), Path("run/events.py"), Path("run/results_json.py")}


def record_lookups(source: str) -> list[str]:
    """Fields of a run's record that are looked up by their names, as keys of a dict."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(slice=ast.Constant(value=str(field)), ctx=ast.Load() | ast.Store()):
                pass
            case ast.Call(func=ast.Attribute(attr="get" | "pop" | "setdefault"), args=[ast.Constant(str(field)), *_]):
                pass
            case ast.Compare(left=ast.Constant(value=str(field)), ops=[ast.In() | ast.NotIn()]):
                pass
            case _:
                continue
        if field in RECORD_FIELDS:
            faults.append(f"line {node.lineno}: {ast.unparse(node)}")
    return faults


LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


def process_questions(source: str) -> list[str]:
    """Where a module asks which process it is: by the launcher's variables, `PartialState` or `get_rank`."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if text in LAUNCHER_VARIABLES:
                faults.append(f"line {node.lineno}: {text}")
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in {"PartialState", "get_rank"}:
                faults.append(f"line {node.lineno}: {name}")
    return faults


def code_in_init(source: str) -> list[int]:
    """Lines of statements that are neither docstring, nor import, nor `__all__`."""

    def allowed(node: ast.stmt) -> bool:
        match node:
            case ast.Expr(value=ast.Constant(value=str())) | ast.Import() | ast.ImportFrom():
                return True
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                return True
        return False

    return [node.lineno for node in ast.parse(source).body if not allowed(node)]


UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")),
    "torch.load",
    "eval",
    "exec",
}


def unsafe(source: str) -> list[str]:
    """Lines that run code found in data: unpickling, YAML tags, `eval`, `exec`."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            continue
        faults += [
            f"line {node.lineno}: {name}"
            for name in names
            if name in UNSAFE_CALLS or name.split(".")[0] in UNSAFE_MODULES
        ]
    return faults


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


def test_the_house_has_few_doors() -> None:
    doors = [path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", "."))]
    doors.remove("py.typed")
    assert len(doors) <= MOST_ROOMS, f"{len(doors)} entries, put the new one into a room: {sorted(doors)}"


@every_module
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_MODULE_LINES
    assert long_functions(source) == []


@every_module
def test_names_say_what_they_hold(path: Path) -> None:
    assert vague_names(path.read_text(encoding="utf-8")) == []


@every_module
def test_the_record_is_read_as_objects(path: Path) -> None:
    if path.relative_to(PACKAGE) not in RECORD_JSON:
        assert record_lookups(path.read_text(encoding="utf-8")) == []


@every_module
def test_one_module_says_which_process_this_is(path: Path) -> None:
    if path.relative_to(PACKAGE) != Path("processes/distributed.py"):
        assert process_questions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=room_of)
def test_a_package_holds_no_code_of_its_own(path: Path) -> None:
    assert code_in_init(path.read_text(encoding="utf-8")) == []


@every_module
def test_model_families_are_known_in_one_place(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[:1] != ("model",):
        source = path.read_text(encoding="utf-8")
        assert family_conditions(source) == [] and family_names(source) == []


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


def test_type_checkers_see_the_public_names_where_they_are() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    homes = importlib.import_module("layerpeel._front_door").HOMES
    assert typed == homes
    for name, home in homes.items():
        public = getattr(importlib.import_module("layerpeel"), name)
        assert public.__module__ == home, f"{name} is imported to {home}, its home is {public.__module__}"


def test_an_unknown_public_name_is_refused() -> None:
    with pytest.raises(ImportError, match="cannot import name 'prune' from 'layerpeel'"):
        from layerpeel import prune  # type: ignore[attr-defined]  # noqa: F401


def test_help_waits_for_no_library_that_takes_seconds() -> None:
    code = (
        "import sys\nfrom layerpeel.cli.process import main\nsys.argv = ['layerpeel', 'remove', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'accelerate', 'datasets', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Remove layers" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


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
    faults = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, content in contents.items()
        if b"\0" not in content[:8192]
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1)
        if HOME_PATH.search(line)
    ]
    assert faults == []


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


def test_family_names_are_seen() -> None:
    source = '"""Of llama."""\nodd = name in ("gpt2", "rwkv")\nlayers = {"phi": "layers"}'
    assert set(family_names(source)) == {"line 2: gpt2", "line 2: rwkv", "line 3: phi"}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("own = 1\nself.found = own", 2),
        ("def here(few, *, _said=None): ...", 3),
        ("rows = [whole for whole in there]", 1),
        ("try: ...\nexcept ValueError as known: ...", 1),
        ("with open(path) as mine: ...", 1),
        ("class Row:\n    its: int", 1),
        ("match value:\n    case [ours, *theirs]: ...", 2),
        ("if (own := 1): ...", 1),
        ("print(own, row.found)  # own\nowner = finding = knowledge = 1", 0),
    ],
)
def test_vague_names_are_seen(source: str, count: int) -> None:
    assert len(vague_names(source)) == count


def test_long_functions_are_seen() -> None:
    body = "\n".join(f"        x = {n}" for n in range(MOST_FUNCTION_LINES - 1))
    assert long_functions(f"class A:\n    def short(self):\n{body}") == []
    assert long_functions(f"class A:\n    def long(self):\n{body}\n        y = 0") == ["line 2: long has 46 lines"]
    assert len(long_functions(f"async def outer():\n    def inner():\n{body}\n        y = 0")) == 2


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("event['kept_quality']", 1),
        ("run.rounds[-1]['scores']['importance'][layer]", 2),
        ("event['training']['seconds'] = 1", 1),
        ("event.get('evaluation', {}).pop('aggregate')", 2),
        ("if 'removed' in event: ...", 1),
        ("event.kept_quality\nnames[0]\noptions['weight']\nprint('removed')", 0),
    ],
)
def test_lookups_in_the_record_are_seen(source: str, count: int) -> None:
    assert len(record_lookups(source)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("os.environ['RANK']", 1),
        ("int(os.environ.get('LOCAL_RANK', 0))", 1),
        ("accelerate.PartialState().process_index", 1),
        ("PartialState(cpu=True)", 1),
        ("torch.distributed.get_rank()", 1),
        ("RANK = rank = 0\nprint('RANK of this')", 0),
    ],
)
def test_questions_for_the_process_are_seen(source: str, count: int) -> None:
    assert len(process_questions(source)) == count


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""Doc."""\nfrom a import b\nimport c\n\n__all__ = ["b", "c"]', []),
        ('"""Doc."""\nNAMES = {}', [2]),
        ("def make():\n    return 1", [1]),
        ("try:\n    import a\nexcept ImportError:\n    a = None", [1]),
    ],
)
def test_code_in_a_package_is_seen(source: str, lines: list[int]) -> None:
    assert code_in_init(source) == lines


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
