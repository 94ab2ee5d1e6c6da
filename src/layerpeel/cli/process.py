"""The `layerpeel` command as a process: its environment, its exit codes, and its messages for exceptions.

Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped by a quality floor. Launchers of several processes start it as a
module: `accelerate launch -m layerpeel run ...`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import tempfile
import traceback
import warnings

from rich.console import Console

from layerpeel.cli.verbs import app
from layerpeel.errors import InputError, LayerpeelError, reason_of
from layerpeel.processes.distributed import RANK, check_launcher, is_main_process, is_of_another_process
from layerpeel.processes.memory import LESS_MEMORY, memory_is_full
from layerpeel.processes.progress import console, shown, write_any_text
from layerpeel.storage.outputs import disk_is_full

OTHERS = "its message tells why, if it had time for one; the same command again goes on from what was saved"


def main() -> None:
    """Runs the `layerpeel` command, and exits with its code."""
    _quiet_libraries()
    write_any_text(sys.stdout, sys.stderr)
    try:
        check_launcher()
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if not (stop := _interruption(end)):
            raise
        console.print("stopped; run the same command again to go on from here")
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))
    except Exception as error:
        _say(error)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _interruption(end: BaseException | None) -> KeyboardInterrupt | None:
    """What interrupted the command, of which typer makes an exit code; None if nothing did."""
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    return end


def _say(error: Exception) -> None:
    """Prints what the user gets for an exception.

    Of several processes the main one speaks for all, where they may all have met the same bad input; what went wrong in
    another one is said by that one.
    """
    speaks, which = console, ""
    if not is_main_process():
        if isinstance(error, InputError):
            return
        speaks, which = Console(stderr=True, highlight=False), f" (process {RANK})"
    message, hint = _explain(error)
    speaks.print(f"[bold red]error{which}:[/] {shown(message)}", soft_wrap=True)
    if hint:
        speaks.print(f"[bold]hint:[/] {shown(hint)}", soft_wrap=True)


def _explain(error: Exception) -> tuple[str, str | None]:
    """The message and the hint that the user gets for an exception; its traceback goes to a file if it is a bug."""
    match error:
        case LayerpeelError():
            return str(error), error.hint
        case RuntimeError() if is_of_another_process(error):
            return f"another process is gone: {reason_of(error)}", OTHERS
        case _ if memory_is_full(error):
            return f"out of memory ({reason_of(error)})", LESS_MEMORY
        case OSError():
            full = disk_is_full(error)
            return _of_file(error), "free some space, then run the same command again" if full else None
        case _:
            return f"a bug in layerpeel: {reason_of(error)}", f"please report it, with {_keep_traceback()}"


def _of_file(error: OSError) -> str:
    """The system's words, after the file's name."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _keep_traceback() -> str:
    """Writes the traceback of the exception in hand to a temporary file, and returns its path."""
    with tempfile.NamedTemporaryFile("w", prefix="layerpeel-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"{platform.platform()}\n{traceback.format_exc()}")
    return file.name


def _quiet_libraries() -> None:
    """Silences warnings, logs and progress bars of libraries, among which layerpeel's messages would be lost."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `data.tokenizing` has threads of its own
    # Read when these libraries are imported, which is where they are first needed:
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or it says so when it tries again
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
