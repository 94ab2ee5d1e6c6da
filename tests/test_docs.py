"""The documentation does what it says: its commands, Python and configs run on a tiny model, and its site builds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from layerpeel import config as config_module
from layerpeel.cli.process import main
from layerpeel.cli.verbs import app
from layerpeel.config.reading import load_config, sections_in
from layerpeel.config.run import RunConfig
from layerpeel.data.documents import read_documents
from layerpeel.importance.metrics import make_metric
from layerpeel.losses.loss_sum import LossSum
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.rounds import distill
from tests.families import tiny_model, tiny_tokenizer
from tests.test_house import ROOMS, lines_of_code

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "studies/README.md", *ROOT.glob("docs/**/*.md")]
]
LAYERS = 27  # of the tiny teacher: pages remove layers 18 and 19, and go to 24

# How commands begin that are not run here, and why. Their verbs, options and targets are checked all the same.
NOT_RUN = {
    "make": "sets .venv up, or runs all tests",
    "python3 -m venv": "sets an environment up",
    ".venv/bin/pip install": "needs a package index",
    "accelerate launch": "wants eight processes; tests/test_parallel.py launches two",
    "torchrun": "wants two processes; tests/test_parallel.py launches them",
}
# What is added to a command that is run, so that it is quick on a tiny model. The last --set holds.
QUICK = [
    "distill.tokens_per_round=64",
    "distill.sequence_length=16",
    "distill.batch_size=2",
    "distill.tokens_per_step=32",
    "score.tokens=64",
]
QUICK_STUDY = ["seeds=[0]", "remove=1", "variants={one: {score.shortlist: null}}", *QUICK, "distill.tokens_per_round=0"]
ADDED = {**dict.fromkeys(["run", "score", "distill", "eval", "plan"], QUICK), "study": QUICK_STUDY}
WITHOUT_TEXT = (
    "distill.repair.tokens=64"  # for a config of `init`: text that the teacher writes is as long as is read of it
)
DEMO_IS_LONG = "variants={one: {teacher: models/my-llama, tasks: [{kind: choice, data: questions.jsonl}]}}"

FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"`((?:stop|score|distill)(?:\.[a-z_]+)+)(?:[:=][^`]*)?`")
INLINE = re.compile(r"`(?:\.venv/bin/)?layerpeel ([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, *languages: str) -> list[Block]:
    text = text_of(page)
    found = [Block(m[2], textwrap.dedent(m[3]), text[: m.start()].count("\n") + 1) for m in FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, split as a shell would."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := shlex.split(line, comments=True))]


def why_not_run(command: list[str]) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command[: len(start.split())] == start.split()), None)


def verb_of(command: list[str]) -> list[str]:
    """The arguments of layerpeel's in a command that runs it."""
    assert Path(command[0]).name == "layerpeel", f"{shlex.join(command)}: no command that this test knows"
    return command[1:]


def parse(arguments: list[str]) -> None:
    """Parses a verb and its options, without running it."""
    root: Any = typer.main.get_command(app)
    assert arguments[0] in root.commands, f"there is no verb {arguments[0]}"
    root.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def call(arguments: list[str]) -> int:
    """Runs layerpeel in this process; gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["layerpeel", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def quick(arguments: list[str]) -> list[str]:
    if arguments[0] == "init":
        return [*arguments, "--no-harness"]  # without a network
    added = [*ADDED.get(arguments[0], []), *([WITHOUT_TEXT] if "first.yaml" in arguments else [])]
    return [*arguments, *(word for value in added for word in ("--set", value))]


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lay_out(folder: Path) -> None:
    """The files that pages name, as a user would have them; and README's my.yaml."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder / "models/my-llama")
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(folder / "models/my-llama")
    words = "w5 w9 w7 w8 w4 w6 " * 6
    choices = [{"context": f"w{n} w9", "choices": ["w7", "w8"], "answer": n % 2} for n in range(5, 11)]
    writing = [{"prompt": "w5 w9", "target": "w7 w8"}, {"prompt": "w4 w6", "target": "w9 w5"}]
    write_rows(folder / "questions.jsonl", *choices)
    write_rows(folder / "riddles.jsonl", *choices)
    exam = [{"question": f"w{n}", "options": ["w7", "w8"], "right": "B"} for n in range(5, 9)]
    write_rows(folder / "exam.jsonl", *exam)
    write_rows(folder / "grammar.jsonl", {"sentence_good": "w5 w9", "sentence_bad": "w9 w5"})
    write_rows(folder / "chats.jsonl", {"messages": [{"role": "user", "content": "w5"}]})
    for name in ("summaries", "copies"):
        write_rows(folder / f"{name}.jsonl", *writing)
    for name in ("held_out", "more"):
        write_rows(folder / f"{name}.jsonl", {"text": words}, {"text": words[6:]})
    (folder / "corpus").mkdir()
    (folder / "corpus/book.txt").write_text("\n<|endoftext|>\n".join([words] * 8))
    for name in ("studies", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    (block,) = (block for block in blocks_of("README.md", "yaml") if block.text.startswith("# my.yaml"))
    (folder / "my.yaml").write_text(block.text)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which README's run has been made."""
    folder = tmp_path_factory.mktemp("docs") / "work"
    folder.mkdir()
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(quick(["run", "my.yaml", "--no-report"])) == 0
    shutil.copytree(folder / "runs/my-llama", folder / "runs/other")
    return folder


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch, quick_measuring: None) -> Iterator[Path]:
    """The working folder, which is as it was again afterwards."""
    kept = workplace.with_name("kept")
    shutil.copytree(workplace, kept)
    monkeypatch.chdir(workplace)
    yield workplace
    shutil.rmtree(workplace)
    kept.rename(workplace)


def test_there_are_pages_with_commands() -> None:
    assert {"README.md", "docs/index.md", "docs/getting-started.md", "docs/faq.md"} <= set(PAGES)
    assert sum(len(commands_of(block)) for page in PAGES for block in blocks_of(page, "sh")) > 30
    fences = sum(len(re.findall(r"^[ ]*```", text_of(page), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * sum(len(FENCE.findall(text_of(page))) for page in PAGES)


def test_what_is_not_run_is_in_some_page() -> None:
    commands = [command for page in PAGES for block in blocks_of(page, "sh") for command in commands_of(block)]
    for start in NOT_RUN:
        assert any(command[: len(start.split())] == start.split() for command in commands), f"{start}: in no page"


def runs_something(page: str) -> bool:
    commands = [command for block in blocks_of(page, "sh") for command in commands_of(block)]
    return any(not why_not_run(command) for command in commands) or bool(blocks_of(page, "python"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runs_something(page)])
def test_commands_and_python_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "load_config", lambda path, sets=(): load_config(path, [*sets, *QUICK]))
    for block in blocks_of(page, "sh", "python", "yaml"):
        if block.language == "yaml" and block.text.startswith("# my.yaml"):
            (folder / "my.yaml").write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {"__name__": "page"})
        elif block.language == "sh":
            for command in commands_of(block):
                if not why_not_run(command):
                    arguments = quick(verb_of(command))
                    if arguments[0] == "study" and not any("base=" in word for word in command):
                        arguments += ["--set", DEMO_IS_LONG]
                    assert call(arguments) == 0, f"{page}: {shlex.join(command)}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_can_be_parsed(page: str) -> None:
    makefile, project = text_of("Makefile"), text_of("pyproject.toml")
    for command in (command for block in blocks_of(page, "sh") for command in commands_of(block)):
        if not why_not_run(command):
            parse(verb_of(command))
        elif command[0] == "make":
            assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in command[1:]), command
        elif command[0].endswith("pip"):
            assert all((ROOT / name).is_file() for name in command if name.endswith(".txt")), command
            extras = re.findall(r"\[(\w+)\]", " ".join(command))
            assert all(re.search(f"^{extra} = \\[", project, re.MULTILINE) for extra in extras), command
        elif command[0] in ("accelerate", "torchrun"):
            launcher = launch_command_parser() if command[0] == "accelerate" else get_args_parser()
            options = launcher.parse_args(command[2:] if command[0] == "accelerate" else command[1:])
            assert options.module and options.training_script == "layerpeel"
            parse(options.training_script_args)


@pytest.mark.parametrize("page", PAGES)
def test_words_in_the_text_are_those_of_the_code(page: str) -> None:
    text = FENCE.sub("", text_of(page))
    root: Any = typer.main.get_command(app)
    for words in (re.split(r"\s+", found) for found in INLINE.findall(text)):
        if words[0].isupper() or words[0].startswith("-"):
            continue
        assert words[0] in root.commands, f"`layerpeel {' '.join(words)}`"
        known = {name for option in root.commands[words[0]].params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, words
    for path in FIELD.findall(text):
        assert has_field(path), f"`{path}` is no field of a config"


NAME = re.compile(r"(?<![\w./-])layerpeel(?:\.[A-Za-z_]\w*)+")
SOURCE = re.compile(r"(?<![\w/])(?:src|tests|scripts|benchmarks|configs|studies)/[\w./-]*\w")
NEW_FILE = re.compile(r"\b[Ww]rite `[^`]*`")  # a page may tell a reader to make a file


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a class, function or attribute in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            fields = {**getattr(value, "__dataclass_fields__", {}), **getattr(value, "__annotations__", {})}
            if not hasattr(value, attribute):
                return attribute in fields and attribute == parts[-1]
            value = getattr(value, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_files_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    assert [name for name in dict.fromkeys(NAME.findall(text)) if not exists(name)] == []
    paths = dict.fromkeys(path for path in SOURCE.findall(NEW_FILE.sub("", text)) if "NAME" not in path)
    folders = (ROOT, ROOT / "docs/images")  # pages of docs/ name their pictures by studies/, too
    assert [path for path in paths if not any((folder / path).exists() for folder in folders)] == []


def test_the_tree_of_the_readme_is_that_of_the_source() -> None:
    (tree,) = (block.text for block in blocks_of("README.md", "") if block.text.startswith("src/layerpeel/"))
    assert re.findall(r"^  (\w+)(?:/|\.py)? ", tree, re.MULTILINE) == ROOMS


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("layerpeel.peel", True),
        ("layerpeel.run.loop", True),
        ("layerpeel.run.folder.Run.student_folder", True),
        ("layerpeel.loop", False),
        ("layerpeel.run.loop.pele", False),
        ("layerpeel.nowhere.at.all", False),
    ],
)
def test_names_that_do_not_exist_are_seen(name: str, there: bool) -> None:
    assert exists(name) == there


def has_field(path: str) -> bool:
    model: Any = RunConfig
    for part in path.split("."):
        if model is None or part not in model.model_fields:
            return False
        model = next(iter(sections_in(model.model_fields[part].annotation)), None)
    return True


def test_fields_are_told_from_others() -> None:
    assert has_field("score.shortlist.keep") and has_field("distill.text.column") and has_field("stop")
    assert not has_field("score.shortlist.kept") and not has_field("distil.text")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "yaml", "json")])
def test_configs_and_rows_can_be_read(page: str, folder: Path) -> None:
    for block in blocks_of(page, "json"):
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    base: dict[str, Any] = {
        "teacher": "models/my-llama",
        "output": "runs/new",
        "stop": {"target_layers": 24},
        "tasks": [{"kind": "choice", "data": "questions.jsonl"}],
        "distill": {"text": "corpus/"},
    }
    for number, block in enumerate(blocks_of(page, "yaml")):
        path = folder / f"{number}.yaml"
        own = yaml.safe_load(block.text)
        path.write_text(yaml.safe_dump(base | own | {"distill": base["distill"] | own.get("distill", {})}))
        found = load_config(path)
        for task in make_tasks([task for task in found.tasks if not task.kind.startswith("my_")]):
            if task.kind != "harness":  # the harness would fetch its data
                task.check()
        LossSum({name: loss for name, loss in found.distill.losses.items() if not name.startswith("my_")})
        if not found.score.decide.startswith("my_"):
            make_metric(found.score.decide)
        for source in found.files_of_text().values():
            next(read_documents(source))


@pytest.fixture
def contributed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """CONTRIBUTING's metric and loss, in modules as its configs name them: their sources by module."""
    metric, loss = (block.text for block in blocks_of("CONTRIBUTING.md", "python"))
    modules = {"my_metrics": metric, "my_losses": loss}
    monkeypatch.syspath_prepend(folder)
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    return modules


def test_the_metric_of_contributing_scores(contributed: dict[str, str]) -> None:
    assert lines_of_code(contributed["my_metrics"]) <= 12
    options = ["--set", "score.decide=my_metrics:NormGrowth", "--set", "score.shortlist=null", "-o", "grown"]
    assert call(quick(["score", "my.yaml", *options])) == 0
    scores = json.loads(Path("grown/scores.json").read_text())
    assert scores["metric"] == "my_metrics:NormGrowth" and len(scores["importance"]) == LAYERS - 2
    assert all(value > 0 for value in scores["importance"].values())


def test_the_loss_of_contributing_trains(contributed: dict[str, str]) -> None:
    (block,) = (block for block in blocks_of("CONTRIBUTING.md", "yaml") if "my_losses" in block.text)
    losses = yaml.safe_load(block.text)["distill"]["losses"]
    config = load_config("my.yaml", [*QUICK, f"distill.losses={json.dumps(losses)}"])
    assert set(config.distill.losses) == {"kl", "my_losses:LogitMSE"}
    _, result = distill(tiny_model("llama"), tiny_tokenizer(), [2], config.distill)
    assert result.curve and all(point["my_losses:LogitMSE"] > 0 for point in result.curve)


# The site


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_references_are_those_of_the_source() -> None:
    made = script("make_reference")
    remedy = "out of date: python scripts/make_reference.py"
    assert text_of("docs/reference/config.md") == made.config_page(), remedy
    assert text_of("docs/reference/cli.md") == made.cli_page(), remedy


def test_results_are_what_the_benchmarks_wrote() -> None:
    results, studies = script("make_results"), script("make_studies")
    assert text_of("docs/results.md") == results.page(), "out of date: python scripts/make_results.py"
    assert text_of("README.md") == results.readme(), "out of date: python scripts/make_results.py"
    assert text_of("docs/studies.md") == studies.page(), "out of date: python scripts/make_studies.py"


def test_every_verb_and_field_is_in_a_reference() -> None:
    root: Any = typer.main.get_command(app)
    assert all(f"\n## {name}\n" in text_of("docs/reference/cli.md") for name in root.commands)
    assert all(f"| `{name}` |" in text_of("docs/reference/config.md") for name in RunConfig.model_fields)


class _Loads(HTMLParser):
    """What a page loads by itself: scripts, styles, icons, fonts, pictures, frames; not where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag != "a" and "canonical" not in (named.get("rel") or ""):
            self.found += [str(named[name]) for name in ("src", "href", "srcset", "data", "poster") if named.get(name)]
        if named.get("style"):
            self.found += _loaded_by_style(str(named["style"]))


def _loaded_by_style(text: str) -> list[str]:
    return [a or b for a, b in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)]


def outside(address: str) -> bool:
    return bool(re.match(r"(?:[a-z]+:)?//", address.strip(), re.IGNORECASE))


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "reference/api.html"} <= {page.relative_to(site).as_posix() for page in pages}
    for page in pages:
        text, loads = page.read_text(encoding="utf-8"), _Loads()
        loads.feed(text)
        assert loads.found and not [each for each in loads.found if outside(each)], page
        assert "mermaid" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL), page
    for style in site.rglob("*.css"):
        assert not [each for each in _loaded_by_style(style.read_text(encoding="utf-8")) if outside(each)], style


def test_what_a_page_loads_is_seen() -> None:
    loads = _Loads()
    loads.feed(
        '<a href="https://a"></a><link rel="stylesheet" href="https://b"><script src="//c"></script><img src="d.svg">'
        '<p style="background: url(https://e)">'
    )
    assert [each for each in loads.found if outside(each)] == ["https://b", "//c", "https://e"]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs/images").glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_can_be_read_aloud_and_in_the_dark(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert re.search(r'<title id="title">[^<]{5,}</title>', text)
    assert re.search(r'<desc id="desc">[^<]{40,}</desc>', text)
    assert "prefers-color-scheme:dark" in text and 'aria-labelledby="title desc"' in text
    assert not re.search(r"(?:href|src)\s*=|@import|url\((?!#)|<script|<image", text)
    assert any(picture.name in text_of(page) for page in PAGES)
