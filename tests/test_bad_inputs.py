"""Bad inputs of every kind: each gets a message that names it and says what to do, exit code 2, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import call, fill

Prepare = Callable[[Path], Any]


def run(*overrides: str) -> list[str]:
    return ["run", "run.yaml", *(word for override in overrides for word in ("--set", override))]


def task(fields: str) -> list[str]:
    return run(f"tasks=[{{{fields}}}]")


def write(name: str, text: str | bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def change(name: str, **fields: Any) -> Prepare:
    """Changes fields of a JSON file; None takes one out."""

    def prepare(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in (old | fields).items() if v is not None}))

    return prepare


def without(*names: str) -> Prepare:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, size: int) -> Prepare:
    return lambda folder: os.truncate(folder / name, size)


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Prepare:
    """Edits the teacher's weights."""

    def prepare(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return prepare


def sharded(*files: str) -> Prepare:
    """An index that names files in place of the teacher's weights."""

    def prepare(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "elsewhere.safetensors")
        index = {"metadata": {}, "weight_map": {name: files[i % len(files)] for i, name in enumerate(names)}}
        (folder / "teacher/model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


def lines(*rows: Any) -> Prepare:
    return write("choice.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


CONFIG, WEIGHTS = "teacher/config.json", "teacher/model.safetensors"
GOOD = {"context": "w5", "choices": ["w7", "w8"], "answer": 0}
DEEP = "[" * 100_000
MODULE = "raise RuntimeError('boom')\n"

CASES: dict[str, tuple[Prepare | None, list[str], str]] = {
    # the model's folder
    "config.json is not JSON": (write(CONFIG, "{"), run(), "teacher/config.json"),
    "config.json is a list": (write(CONFIG, "[]"), run(), "teacher/config.json"),
    "config.json is empty": (write(CONFIG, ""), run(), "teacher/config.json"),
    "config.json is not text": (write(CONFIG, b"\xff\xfe\x00"), run(), "teacher/config.json"),
    "config.json nests without end": (write(CONFIG, DEEP), run(), "teacher/config.json"),
    "no model_type": (change(CONFIG, model_type=None), run(), "model_type"),
    "unknown model_type": (change(CONFIG, model_type="lama"), run(), "lama"),
    "model_type is a number": (change(CONFIG, model_type=5), run(), "model type `5`"),
    "hidden size is text": (change(CONFIG, hidden_size="wide"), run(), "hidden_size"),
    "negative depth": (change(CONFIG, num_hidden_layers=-1), run(), "a model of -1 layers has none to spare"),
    "no depth": (change(CONFIG, num_hidden_layers=0), run(), "layer"),
    "one layer": (change(CONFIG, num_hidden_layers=1), run(), "1"),
    "deeper than its weights": (change(CONFIG, num_hidden_layers=7), run(), "lacks weights"),
    "wider than its weights": (change(CONFIG, hidden_size=64, head_dim=16), run(), "teacher"),
    "heads do not divide": (change(CONFIG, hidden_size=33, head_dim=None), run(), "teacher"),
    "absurd width": (change(CONFIG, hidden_size=10**9), run(), "memory"),
    "absurd depth": (change(CONFIG, num_hidden_layers=10**9), run(), "memory"),
    "absurd vocabulary": (change(CONFIG, vocab_size=10**13), run(), "memory"),
    "needs its own code": (
        change(CONFIG, auto_map={"AutoConfig": "own.Config"}, model_type="mine"),
        run(),
        "trust_remote_code",
    ),
    "other dtype": (change(CONFIG, dtype="float33", torch_dtype="float33"), run(), "float33"),
    "no weights": (without(WEIGHTS), run(), "teacher"),
    "pickled weights only": (lambda f: (f / WEIGHTS).rename(f / "teacher/pytorch_model.bin"), run(), "safetensors"),
    "empty weights": (cut(WEIGHTS, 0), run(), "teacher"),
    "header cut off": (cut(WEIGHTS, 100), run(), "teacher"),
    "weights cut off": (cut(WEIGHTS, 20_000), run(), "teacher"),
    "weights are text": (write(WEIGHTS, "hello, world: these are no weights"), run(), "teacher"),
    "header of absurd size": (write(WEIGHTS, b"\xff" * 64), run(), "teacher"),
    "weights of other shapes": (
        tensors(lambda s: s.update({"model.norm.weight": torch.ones(7)})),
        run(),
        "model.norm.weight is of shape [7], expected [32]",
    ),
    "a tensor missing": (tensors(lambda s: s.pop("model.norm.weight")), run(), "model.norm.weight"),
    "NaN in the weights": (tensors(lambda s: s["model.norm.weight"].fill_(float("nan"))), run(), "NaN"),
    "index names an absent file": (sharded("gone.safetensors"), run(), "gone.safetensors"),
    "index leaves the folder": (sharded("../elsewhere.safetensors"), run(), "elsewhere.safetensors"),
    "index is not JSON": (
        lambda f: ((f / WEIGHTS).unlink(), write("teacher/model.safetensors.index.json", "{")(f)),
        run(),
        "index",
    ),
    "index is a list": (
        lambda f: ((f / WEIGHTS).unlink(), write("teacher/model.safetensors.index.json", "[]")(f)),
        run(),
        "index",
    ),
    "no tokenizer": (without("teacher/tokenizer.json", "teacher/tokenizer_config.json"), run(), "tokenizer"),
    "tokenizer is not JSON": (write("teacher/tokenizer.json", "{"), run(), "tokenizer"),
    "tokenizer is a list": (write("teacher/tokenizer.json", "[]"), run(), "tokenizer"),
    "tokenizer_config is a list": (write("teacher/tokenizer_config.json", "[]"), run(), "tokenizer"),
    "teacher is a file": (None, run("teacher=run.yaml"), "run.yaml"),
    "teacher is empty": (None, run("teacher=''"), "teacher"),
    "teacher is a loop of links": (lambda f: (f / "loop").symlink_to("loop"), run("teacher=./loop"), "loop"),
    "teacher of a hub that is off": (None, run("teacher=someone/some-model"), "someone/some-model"),
    "teacher is no name": (None, run("teacher='a b/c:d?'"), "a b/c:d?"),
    "teacher is a list": (None, run("teacher=[a]"), "teacher"),
    "teacher with a NUL": (None, run('teacher="a\\0b"'), "a\\u0000b"),
    "teacher is very long": (None, run("teacher=./" + "x" * 5000), "no such model: ./xxxx"),
    # the config
    "config is a folder": (None, ["run", "teacher"], "teacher"),
    "config is a list": (write("x.yaml", "- a\n- b\n"), ["run", "x.yaml"], "x.yaml: expected a mapping"),
    "config is empty": (write("x.yaml", ""), ["run", "x.yaml"], "x.yaml"),
    "config is text": (write("x.yaml", "hello"), ["run", "x.yaml"], "x.yaml"),
    "config is binary": (write("x.yaml", b"\x00\xff"), ["run", "x.yaml"], "x.yaml"),
    "config has tabs": (write("x.yaml", "stop:\n\ttarget_layers: 5\n"), ["run", "x.yaml"], "x.yaml"),
    "config has a key twice": (lambda f: (f / "run.yaml").open("a").write("output: other\n"), run(), "output"),
    "config has a tag": (
        write("x.yaml", "teacher: !!python/object/apply:os.system ['true']"),
        ["run", "x.yaml"],
        "x.yaml",
    ),
    "config nests without end": (write("x.yaml", DEEP), ["run", "x.yaml"], "x.yaml"),
    "config grows without end": (
        write(
            "x.yaml",
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
        ),
        ["run", "x.yaml"],
        "more than 100,000 values",
    ),
    "config contains itself": (write("x.yaml", "&a\nteacher: *a\n"), ["run", "x.yaml"], "more than 100,000 values"),
    "config has a list for a key": (write("x.yaml", "? [a, b]\n: 1\n"), ["run", "x.yaml"], "x.yaml"),
    "config has a number for a key": (None, run("stop={1: 2, target_layers: 5}"), "stop.1"),
    "config may not be read": (lambda f: (f / "run.yaml").chmod(0), run(), "run.yaml"),
    "config is a loop of links": (lambda f: (f / "x.yaml").symlink_to("x.yaml"), ["run", "x.yaml"], "x.yaml"),
    "section is a list": (None, run("stop=[5]"), "stop"),
    "section is null": (None, run("distill=null"), "distill"),
    "depth is NaN": (None, run("stop.target_layers=.nan"), "stop.target_layers"),
    "depth is a fraction": (None, run("stop.target_layers=4.5"), "stop.target_layers"),
    "depth is huge": (None, run("stop.target_layers=1" + "0" * 30), "stop.target_layers"),
    "depth of many digits": (None, run("stop.target_layers=1" + "0" * 5000), "stop.target_layers"),
    "quality is NaN": (None, run("stop.min_quality=.nan"), "stop.min_quality"),
    "size in no words": (None, run("stop.max_params=1.2.3B"), "stop.max_params"),
    "size is endless": (None, run("stop.max_params=" + "9" * 400 + "B"), "stop.max_params"),
    "memory in no words": (None, run("score.memory=1.2.3GB"), "score.memory"),
    "memory of NaN": (None, run("score.memory=.nan"), "score.memory"),
    "learning rate is NaN": (None, run("distill.learning_rate=.nan"), "distill.learning_rate"),
    "learning rate is infinite": (None, run("distill.learning_rate=.inf"), "distill.learning_rate"),
    "learning rate is negative": (None, run("distill.learning_rate=-1"), "distill.learning_rate"),
    "weight decay is infinite": (None, run("distill.weight_decay=.inf"), "distill.weight_decay"),
    "clipping to NaN": (None, run("distill.max_grad_norm=.nan"), "distill.max_grad_norm"),
    "loss weight is NaN": (None, run("distill.losses={kl: {weight: .nan}}"), "weight"),
    "loss weight is infinite": (None, run("distill.losses={kl: {weight: .inf}}"), "weight"),
    "loss is a list": (None, run("distill.losses=[kl]"), "distill.losses"),
    "loss option is unknown": (None, run("distill.losses={kl: {temprature: 2}}"), "temprature"),
    "losses all weigh nothing": (None, run("distill.losses={kl: {weight: 0}}"), "distill: losses"),
    "batch is negative": (None, run("distill.batch_size=-1"), "distill.batch_size"),
    "batch is absurd": (
        None,
        run("distill.batch_size=1000000000000", "distill.tokens_per_step=1000000000000"),
        "distill.batch_size",
    ),
    "rows are absurd": (None, run("distill.sequence_length=1000000000000"), "distill.sequence_length"),
    "tokens are absurd": (None, run("distill.tokens_per_round=1000000000000000"), "distill.tokens_per_round"),
    "score tokens are absurd": (None, run("score.tokens=1000000000000000"), "score.tokens"),
    "score memory is absurd": (None, run("score.memory=900TB"), "score.memory"),
    "rows longer than the model": (
        None,
        run("distill.sequence_length=100000", "distill.tokens_per_round=400000"),
        "distill.sequence_length",
    ),
    "seed is negative": (None, run("seed=-1"), "seed"),
    "seed is huge": (None, run("seed=1" + "0" * 40), "seed"),
    "seed is text": (None, run("seed=lucky"), "seed"),
    "aggregate is unknown": (None, run("aggregate=median"), "aggregate"),
    "dtype is unknown": (None, run("dtype=float8"), "dtype"),
    "device is unknown": (None, run("device=gpu"), "unknown device 'gpu'"),
    "device is not here": (None, run("device=cuda:99"), "cuda:99"),
    "device is empty": (None, run("device=''"), "device"),
    "device is meta": (None, run("device=meta"), "device"),
    "float16 is trained": (None, run("dtype=float16"), "dtype"),
    "tracker is unknown": (None, run("trackers=[mlflow]"), "trackers"),
    "streamed weights in a run": (None, run("score.weights=stream"), "score.weights"),
    "streamed training in a run": (None, run("distill.weights=stream"), "in all that it does, or in nothing"),
    "protects beyond the depth": (None, run("score.protect.layers=[6]"), "score.protect.layers"),
    "protects a negative layer": (None, run("score.protect.layers=[-1]"), "score.protect.layers"),
    "protects all": (None, run("score.protect={first: 3, last: 3}"), "score.protect"),
    "shortlist keeps none": (None, run("score.shortlist={keep: 0}"), "score.shortlist.keep"),
    "shortlist is unknown": (None, run("score.shortlist={by: teacher_lk, keep: 2}"), "teacher_lk"),
    "metric is empty": (None, run("score.decide=''"), "unknown metric ''"),
    "metric is a module": (None, run("score.decide=json"), "json"),
    "metric's module is absent": (None, run("score.decide='nowhere:Thing'"), "nowhere"),
    "metric's module raises": (
        write("raises_on_import.py", MODULE),
        run("score.decide='raises_on_import:Thing'"),
        "boom",
    ),
    "metric's module does not parse": (
        write("cannot_parse.py", "def ("),
        run("score.decide='cannot_parse:Thing'"),
        "cannot_parse",
    ),
    "metric's module exits": (
        write("exits_on_import.py", "import sys; sys.exit(0)"),
        run("score.decide='exits_on_import:Thing'"),
        "exits_on_import",
    ),
    "metric is another class": (None, run("score.decide='collections:OrderedDict'"), "collections:OrderedDict"),
    "loss is another class": (None, run("distill.losses={'collections:OrderedDict': {}}"), "collections:OrderedDict"),
    "task is another class": (
        None,
        task("kind: 'collections:OrderedDict', data: choice.jsonl"),
        "collections:OrderedDict",
    ),
    "training names nothing": (None, run("distill.train=no_such_parameter"), "distill.train"),
    "training names no pattern": (None, run("distill.train='['"), "distill: train"),
    "heal without text": (None, run("distill={tokens_per_round: 0}", "score.heal={}"), "distill.text"),
    "heal keeps one": (None, run("score.heal={keep: 1}"), "score.heal.keep"),
    "last pass of nothing": (None, run("distill.last_pass={tokens: 0}"), "distill.last_pass.tokens"),
    "output is a file": (None, run("output=run.yaml"), "run.yaml"),
    "output is below a file": (None, run("output=run.yaml/out"), "run.yaml"),
    "output is the teacher": (None, run("output=teacher"), "teacher"),
    "output is in the teacher": (None, run("output=teacher/out"), "teacher"),
    "output is empty": (None, run("output=''"), "output"),
    "output may not be written": (lambda f: (f / "locked").mkdir(mode=0o500), run("output=locked/out"), "locked"),
    "output is a loop of links": (lambda f: (f / "loop").symlink_to("loop"), run("output=loop"), "loop"),
    "output has a NUL": (None, run('output="a\\0b"'), "output"),
    "output is very long": (None, run("output=" + "x" * 300), "output"),
    # data
    "text is a folder of nothing": (lambda f: (f / "none").mkdir(), run("distill.text=none"), "none"),
    "text of blank lines": (write("blank.txt", "\n \n\t\n"), run("distill.text=blank.txt"), "blank.txt"),
    "text of another kind": (
        write("a.docx", b"PK\x03\x04\xff"),
        run("distill.text=./a.docx"),
        "a.docx: files that end in .docx are not read",
    ),
    "text is an archive": (write("a.zip", "x"), run("distill.text=./a.zip"), "a.zip"),
    "text is no gzip": (write("a.txt.gz", "hello"), run("distill.text=a.txt.gz"), "a.txt.gz"),
    "text may not be read": (lambda f: (f / "text.txt").chmod(0), run(), "text.txt"),
    "text is a loop of links": (lambda f: (f / "l.txt").symlink_to("l.txt"), run("distill.text=l.txt"), "l.txt"),
    "text matches nothing": (None, run("distill.text='*.nothing'"), "*.nothing"),
    "text is empty": (None, run("distill.text=''"), "distill.text"),
    "text is a pipe": (lambda f: os.mkfifo(f / "pipe.txt"), run("distill.text=pipe.txt"), "pipe.txt"),
    "text in a hub that is off": (None, run("distill.text=someone/some-data"), "someone/some-data"),
    "text with a NUL in its name": (None, run('distill.text="a\\0b.txt"'), "no such file: a\\u0000b.txt"),
    "JSON is no list of objects": (write("a.json", "5"), run("distill.text=a.json"), "a.json"),
    "JSONL of lists": (write("a.jsonl", "[1]\n"), run("distill.text=a.jsonl"), "a.jsonl, line 1"),
    "JSONL nests without end": (write("a.jsonl", '{"text": ' + DEEP), run("distill.text=a.jsonl"), "a.jsonl, line 1"),
    "JSONL with endless number": (
        write("a.jsonl", '{"text": ' + "9" * 5000 + "}\n"),
        run("distill.text=a.jsonl"),
        "a.jsonl",
    ),
    "JSONL of numbers for text": (write("a.jsonl", '{"text": 5}\n'), run("distill.text=a.jsonl"), "column 'text'"),
    "JSONL of nothing": (write("a.jsonl", "\n\n"), run("distill.text=a.jsonl"), "a.jsonl"),
    "JSONL of lone surrogates": (
        write("a.jsonl", '{"text": "w5 \\ud800 w7"}\n'),
        run("distill.text=a.jsonl"),
        "a.jsonl",
    ),
    "parquet is none": (write("a.parquet", "PAR1"), run("distill.text=a.parquet"), "a.parquet"),
    "arrow is none": (write("a.arrow", "ARROW1"), run("distill.text=a.arrow"), "a.arrow"),
    "CSV without the column": (write("a.csv", "a,b\n1,2\n"), run("distill.text=a.csv"), "a, b"),
    "dataset folder is broken": (
        lambda f: ((f / "d").mkdir(), write("d/dataset_info.json", "{")(f)),
        run("distill.text=d"),
        "d: ",
    ),
    "weight of text is zero": (None, run("distill.text=[{path: text.txt, weight: 0}]"), "distill.text.0.weight"),
    "chats without a template": (
        write("a.jsonl", '{"messages": [{"role": "user", "content": "w5"}]}\n'),
        run("distill.text=a.jsonl"),
        "a.jsonl",
    ),
    # tasks
    "no tasks": (None, run("tasks=[]"), "tasks"),
    "tasks are a mapping": (None, run("tasks={kind: choice}"), "tasks"),
    "task without a kind": (None, task("data: choice.jsonl"), "kind"),
    "task without data": (None, task("kind: choice"), "data"),
    "task of an unknown option": (None, task("kind: choice, data: choice.jsonl, promt: x"), "did you mean 'prompt'"),
    "task of an unknown metric": (None, task("kind: generate, data: choice.jsonl, metric: rogue1"), "metric"),
    "task of a list for a prompt": (None, task("kind: choice, data: choice.jsonl, prompt: [a]"), "prompt"),
    "task named by a list": (None, task("kind: choice, name: [a], data: choice.jsonl"), "name"),
    "task of NaN rows": (None, task("kind: choice, data: choice.jsonl, limit: .nan"), "limit"),
    "harness task is unknown": (None, task("kind: harness, task: mmlo"), "did you mean"),
    "harness file is absent": (None, task("kind: harness, task: gone.yaml"), "gone.yaml"),
    "harness file is no task": (write("t.yaml", "- 1\n"), task("kind: harness, task: t.yaml"), "t.yaml"),
    "choices of one": (lines(GOOD | {"choices": ["w7"]}), run(), "expected a list of choices"),
    "choices are text": (lines(GOOD | {"choices": "w7"}), run(), "expected a list of choices"),
    "choices are null": (lines(GOOD | {"choices": None}), run(), "expected a list of choices"),
    "choices of one template": (None, task("kind: choice, data: choice.jsonl, choices: ['{context}']"), "choices"),
    "choices of no template": (None, task("kind: choice, data: choice.jsonl, choices: []"), "choices"),
    "answer beyond the choices": (lines(GOOD, GOOD | {"answer": 2}), run(), "holds 2"),
    "answer below zero": (lines(GOOD | {"answer": -1}), run(), "holds -1"),
    "answer is null": (lines(GOOD | {"answer": None}), run(), "holds None"),
    "answer is odd digits": (lines(GOOD | {"answer": "²"}), run(), "holds '²'"),
    "answer of endless digits": (lines(GOOD | {"answer": "9" * 5000}), run(), "answer"),
    "prompt asks for attributes": (
        None,
        task("kind: choice, data: choice.jsonl, prompt: '{context.__class__}'"),
        "not attributes",
    ),
    "prompt asks for an absent column": (
        None,
        task("kind: choice, data: choice.jsonl, prompt: '{question}'"),
        "context, choices, answer",
    ),
    "prompt asks beyond a list": (None, task("kind: choice, data: choice.jsonl, prompt: '{choices[7]}'"), "has no '7'"),
    "pairs of numbers": (
        lines({"sentence_good": 1, "sentence_bad": 2}),
        task("kind: pairs, data: choice.jsonl"),
        "expected text",
    ),
    "stop is a number": (None, task("kind: generate, data: choice.jsonl, stop: 5"), "stop"),
    "shows more than can be counted": (
        None,
        task(f"kind: choice, data: choice.jsonl, num_fewshot: {10**30}"),
        "too large",
    ),
    "a batch of more than a number holds": (None, run(f"distill.batch_size={hex(16**300)}"), "too large"),
    "a text with a name too long": (None, run(f"distill.text={'a' * 5000}"), "aaaa"),
    "shows more than there is": (None, task("kind: choice, data: choice.jsonl, num_fewshot: 9"), "too few"),
    "shows all there is": (None, task("kind: choice, data: choice.jsonl, num_fewshot: 4"), "no other rows"),
    "task's data is empty": (write("choice.jsonl", ""), run(), "choice.jsonl"),
    "task's data is a folder": (None, task("kind: choice, data: teacher"), "teacher"),
    "perplexity of nothing": (write("b.jsonl", '{"text": " "}\n'), task("kind: perplexity, data: b.jsonl"), "no text"),
    "rouge of a list": (
        lines({"prompt": "w5", "target": None}),
        task("kind: generate, data: choice.jsonl, metric: rouge1"),
        "target",
    ),
    # the command line
    "no such verb": (None, ["rum"], "rum"),
    "no such option": (None, ["run", "run.yaml", "--sed", "x=1"], "--sed"),
    "no config": (None, ["run"], "CONFIG"),
    "no layers": (None, ["remove", "teacher", "-o", "x"], "--layers"),
    "layers of nothing": (None, ["remove", "teacher", "--layers", "", "-o", "x"], "--layers"),
    "layers backwards": (None, ["remove", "teacher", "--layers", "3-1", "-o", "x"], "--layers"),
    "layers twice": (None, ["remove", "teacher", "--layers", "1,1", "-o", "x"], "1"),
    "layers beyond": (None, ["remove", "teacher", "--layers", "4-9", "-o", "x"], "layer 6"),
    "all layers": (None, ["remove", "teacher", "--layers", "0-5", "-o", "x"], "layer"),
    "layers without end": (None, ["remove", "teacher", "--layers", "0-99999999999", "-o", "x"], "--layers"),
    "layers in odd digits": (None, ["remove", "teacher", "--layers", "²", "-o", "x"], "--layers"),
    "output is the config": (None, ["remove", "teacher", "--layers", "1", "-o", "run.yaml"], "run.yaml"),
    "output in the model": (None, ["remove", "teacher", "--layers", "1", "-o", "teacher/x"], "teacher"),
    "distils nothing": (
        None,
        ["distill", "run.yaml", "--layers", "1", "-o", "x", "--set", "distill.tokens_per_round=0"],
        "tokens_per_round",
    ),
    "--set of nothing": (None, run(""), "--set"),
    "--set of no field": (None, run("=5"), "--set"),
    "--set of an unknown section": (None, run("stopp.target_layers=5"), "did you mean 'stop'"),
    "--set into a list": (None, run("tasks.0.kind=pairs"), "--set"),
    "--set of a dot": (None, run(".=5"), "--set"),
    "--set nests without end": (None, run("seed=" + DEEP), "--set"),
    "report on nothing": (None, ["report", "gone"], "gone holds no run"),
    "export of a round in words": (None, ["export", "out", "-o", "x", "--round", "two"], "'--round'"),
    "eval of nothing": (None, ["eval", "./gone", "run.yaml"], "./gone"),
    "score into a file": (None, ["score", "run.yaml", "-o", "run.yaml"], "run.yaml"),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("filled"))


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_gets_a_message_and_exit_code_two(
    case: str, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, arguments, message = CASES[case]
    if "may not be" in case and not os.geteuid():
        pytest.skip("root may do everything")
    folder = shutil.copytree(filled, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    if prepare:
        prepare(folder)
    before = set(folder.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and ("hint:" in err or "--help' for help" in err)
    assert "Traceback" not in err
    left = {path for path in set(folder.rglob("*")) - before if "__pycache__" not in path.parts}
    assert not left


ENVIRONMENTS = {
    "RANK": ({"RANK": "first"}, "RANK is 'first'"),
    "WORLD_SIZE": ({"WORLD_SIZE": "-4"}, "WORLD_SIZE is '-4'"),
    "LOCAL_RANK": ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
    "a rank beyond": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of WORLD_SIZE 2"),
    "no address": ({"WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_bad_environment_gets_one_too(
    case: str, filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, message = ENVIRONMENTS[case]
    monkeypatch.chdir(filled)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = call(monkeypatch, capsys, "run", "run.yaml")
    assert (code, out) == (2, "") and message in err and "hint:" in err


def test_there_are_sixty_and_more() -> None:
    assert len(CASES) >= 60


def test_a_bug_of_ours_is_said_to_be_one(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("[red]\x1b[31mboo")

    monkeypatch.chdir(filled)
    monkeypatch.setattr("layerpeel.run.places.load_run_config", broken)
    code, out, err = call(monkeypatch, capsys, "run", "run.yaml")
    assert code == 1 and not out and "Traceback" not in err and "\x1b" not in err
    assert "error: a bug in layerpeel: '[red]" in err
    kept = Path(err.split("please report it, with ")[1].strip())
    assert "Traceback (most recent call last)" in kept.read_text() and "KeyError" in kept.read_text()
    kept.unlink()
