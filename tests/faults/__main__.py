"""Kills runs, fills their disk and damages their files, and compares what comes of them with an undisturbed run.

    python -m tests.faults --kills 100 --disks 10 --flips 50        (`make faults`)

Prints what was done in JSON, and exits with 1 if any run ended with other numbers, another student, or in silence.
Seeds are fixed, but moments in time are the machine's. Needs fork; a full disk needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerpeel.config.reading import load_config, parse_config
from layerpeel.config.run import RunConfig
from layerpeel.demo.preparing import prepare_demo
from layerpeel.errors import LayerpeelError
from layerpeel.run.events import event_to_json
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.storage.files import sha256_of
from tests.families import save_texts, save_tiny

TIMES = {"time", "seconds", "heal_seconds", "cached", "checksum", "files", "process", "memory", "memory_halved"}
LIMIT = 300.0  # seconds that any run may take


def tiny_config(folder: Path) -> RunConfig:
    """Six layers to four, with a shortlist, a cache of the teacher's states and a last pass: about a second."""
    text = str(save_texts(folder / "text.jsonl"))
    return parse_config(
        {
            "teacher": str(save_tiny(folder / "teacher")),
            "output": str(folder / "whole"),
            "stop": {"target_layers": 4},
            "score": {"decide": "task_quality", "shortlist": {"by": "teacher_kl", "keep": 2}, "tokens": 64},
            "tasks": [{"kind": "perplexity", "data": text, "limit": 5}],
            "distill": {
                "text": text,
                "tokens_per_round": 512,
                "tokens_per_step": 64,
                "sequence_length": 16,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "save_every": 0,
                "fresh_text": False,
                "balance_losses": True,
                "last_pass": {"tokens": 192},
            },
        },
        "faults",
    )


def demo_config(folder: Path) -> RunConfig:
    """The demo from 12 layers to 10, with a few samples of each task and a few steps in each round."""
    config = load_config(prepare_demo(folder), ["stop.target_layers=10", "score.tokens=512", f"output={folder}/whole"])
    for task in config.tasks:
        task.limit = 4  # type: ignore[attr-defined]
    config.distill = config.distill.model_copy(update={"tokens_per_round": 6 * 512, "save_every": 0.0})
    return config


def numbers(value: Any) -> Any:
    """All but what is the machine's."""
    if isinstance(value, dict):
        return {key: numbers(own) for key, own in value.items() if key not in TIMES}
    return [numbers(own) for own in value] if isinstance(value, list) else value


def outcome(folder: Path) -> Any:
    """What has to be the same however a run came to its end."""
    run = Run(folder)
    assert run.finish and run.teacher
    rounds = [event for each in run.rounds for event in (each.scored, each.end)]
    events = [event_to_json(event) for event in (run.teacher, *rounds, run.finish)]
    curves = [[numbers(point) for point in run.curve(each)] for each in run.rounds]
    weights = [sha256_of(run.round_folder(each.number) / "trained.safetensors") for each in run.rounds]
    student = {path.name: sha256_of(path) for path in run.student_folder.glob("*.json*")}
    return json.loads(json.dumps([numbers(events), curves, weights, student, run.finish.files]))


class Child:
    """A run in a process of its own, that can be killed."""

    def __init__(self, config: RunConfig, *, dies_at: int | None = None) -> None:
        """Forks. `dies_at`: the child kills itself before its so manieth operation on the disk."""
        self.said = Path(tempfile.mkstemp()[1])
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._work(config, dies_at))

    def _work(self, config: RunConfig, dies_at: int | None) -> int:
        os.dup2(os.open(self.said, os.O_WRONLY | os.O_TRUNC), 2)
        if dies_at is not None:
            _die_at(dies_at)
        try:
            peel(config)
        except LayerpeelError as error:
            os.write(2, f"error: {error}\nhint: {error.hint}\n".encode())
            return 1
        except KeyboardInterrupt as stop:
            return 128 + int(getattr(stop, "signal", 0))
        except BaseException as error:
            os.write(2, f"Traceback {error!r}\n".encode())
            return 70
        return 0

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code (minus the signal that killed it); None if it still runs after so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        os.kill(self.pid, number)
        return self.wait()

    def message(self) -> str:
        text = self.said.read_text(errors="replace")
        self.said.unlink()
        return text


def _die_at(count: int) -> None:
    """Kills this process before its so manieth fsync or rename: right in the middle of what it writes."""
    left = [count]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def stage(folder: Path) -> str:
    """What a run was at when it was killed."""
    if not (folder / "journal.jsonl").exists() or not Run(folder).events:
        return "beginning"
    if any(folder.rglob("*.partial")) or any(folder.rglob(".*.old")):
        return "saving"
    last = Run(folder).live[-1].event
    if last == "scored":
        return "training" if (folder / "rounds/.training").exists() else "removing"
    scoring = any((folder / "rounds/.answers").glob("*"))
    return "scoring" if scoring else {"resume": "resuming", "finish": "finished"}.get(last, "between")


class Faults:
    """A run that nothing disturbs, and others of the same config that have something done to them."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.failures = config, folder, list[str]()
        self.random = random.Random(0)
        started = time.monotonic()
        child = Child(config)
        assert child.wait() == 0, child.message()
        self.seconds = time.monotonic() - started
        self.expected = outcome(config.output)

    def at(self, folder: Path) -> RunConfig:
        return self.config.model_copy(update={"output": folder})

    def same(self, folder: Path, what: str, named: str = "") -> None:
        """Compares, but for what was said to be lost: curves, and weights of a round that the result needs no more."""
        found = outcome(folder)
        found[2] = [
            whole if f"rounds/{number:02d}/trained.safetensors:damagedorgone;thatround" in named else own
            for number, (own, whole) in enumerate(zip(found[2], self.expected[2], strict=True), start=1)
        ]
        found[1] = [
            own or whole for own, whole in zip(found[1], self.expected[1], strict=True)
        ]  # a lost curve is named
        if found != self.expected:
            self.failures.append(f"{what}: the run ended with other numbers or another student")

    def finish(self, folder: Path, what: str) -> None:
        """Goes on with a run to its end, and compares."""
        child = Child(self.at(folder))
        code, said = child.wait(), child.message()
        if code != 0 or "Traceback" in said:
            self.failures.append(f"{what}: exit code {code}, {said}")
        else:
            self.same(folder, what)

    def kills(self, count: int) -> dict[str, Any]:
        """Kills runs, each as often as it takes to its end: at moments in time, and before operations on the disk."""
        stages: Counter[str] = Counter()
        folder, runs, most = self.folder / "kill-0", 0, 100
        while stages.total() < count:
            by_count = stages.total() % 2 == 1
            child = Child(self.at(folder), dies_at=self.random.randrange(most) if by_count else None)
            code = child.wait() if by_count else child.wait(self.random.uniform(0.0, self.seconds))
            if code is None:
                code = child.kill()
            said = child.message()
            if code == -signal.SIGKILL:
                stages[stage(folder)] += 1
                continue
            if code != 0:
                self.failures.append(f"kill {stages.total()}: exit code {code}, {said}")
                break
            self.same(folder, f"after kill {stages.total()}")
            shutil.rmtree(folder)
            runs, folder = runs + 1, self.folder / f"kill-{runs + 1}"
        if folder.exists():
            self.finish(folder, "the last of the killed runs")
            runs += 1
        return {"kills": stages.total(), "runs": runs, "stages": dict(stages)}

    def disks(self, count: int) -> dict[str, Any] | str:
        """Runs on a disk that is too small, until there is more room."""
        size = sum(path.stat().st_size for path in self.config.output.rglob("*") if path.is_file())
        reached, full = list[float](), 0
        for number in range(count):
            share = (number + self.random.random()) / count
            try:
                with tmpfs(self.folder / f"disk-{number}", int(1.5 * share * size)) as (folder, grow):
                    child = Child(self.at(folder / "run"))
                    code, said = child.wait(), child.message()
                    if code == 1 and "no space left on the disk of" in said and "run the same command again" in said:
                        full += 1
                        reached.append(round(share, 2))
                    elif code != 0:
                        self.failures.append(f"disk {number}: exit code {code}, {said}")
                        continue
                    grow(8 * size)
                    self.finish(folder / "run", f"disk {number}")
                    if any(event.event == "back" for event in Run(folder / "run").events):
                        self.failures.append(f"disk {number}: a file was damaged")
            except PermissionError:
                return "skipped: no right to mount a tmpfs"
        return {"full": full, "large_enough": count - full, "shares_of_the_space": reached}

    def flips(self, count: int) -> dict[str, Any]:
        """Flips a bit, or cuts the end off, of a file of a run that is finished or in the middle, then runs it."""
        halfway = self._halfway()
        found: Counter[str] = Counter()
        for number in range(count):
            source = self.config.output if number % 2 else halfway
            folder = self.folder / "flip"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            name, what = self._damage(folder)
            child = Child(self.at(folder))
            code, said = child.wait(), " ".join(child.message().split())
            if code == 0:
                self.same(folder, what, named=said.replace(" ", ""))
                found["found, and mended or named" if "damaged" in said else "harmless"] += 1
            elif code == 1 and Path(name).name in said and "hint:" in said:
                found["refused, with the file's name"] += 1
            else:
                self.failures.append(f"{what}: exit code {code}, {said}")
        return dict(found)

    def _halfway(self) -> Path:
        """A run that was killed in the training of its second round."""
        folder = self.folder / "halfway"
        child = Child(self.at(folder))
        while not (folder / "rounds/01").exists() or not any((folder / "rounds/.training").glob("[0-9]*")):
            assert child.wait(0.001) is None, child.message()
        child.kill()
        child.message()
        return folder

    def _damage(self, folder: Path) -> tuple[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name != "README.md")
        path = self.random.choice([p for p in files if "report" not in p.relative_to(folder).parts])
        content = bytearray(path.read_bytes())
        place = self.random.randrange(len(content))
        how = self.random.choice(["flip", "flip", "cut"])
        if how == "cut":
            del content[place:]
        else:
            content[place] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        name = path.relative_to(folder).as_posix()
        return name, f"{how} at byte {place} of {name}"


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A disk of so many bytes, and how to make it larger."""
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(done.stderr)

    mount("-t", "tmpfs", "-o", f"size={max(4096, size)}", "tmpfs")
    try:
        yield folder, lambda larger: mount("-o", f"remount,size={larger}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a random model of six layers, not the demo's")
    for name in ("kills", "disks", "flips"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make = tiny_config if options.tiny else demo_config
        faults = Faults(make(Path(folder)), Path(folder))
        said: dict[str, Any] = {"seconds_undisturbed": round(faults.seconds, 1)}
        for name in ("kills", "disks", "flips"):
            if count := getattr(options, name):
                started = time.monotonic()
                said[name] = getattr(faults, name)(count)
                said[f"seconds_of_{name}"] = round(time.monotonic() - started)
        print(json.dumps(said | {"failures": faults.failures}, indent=1))
    return 1 if faults.failures else 0


if __name__ == "__main__":
    sys.exit(main())
