"""The command as a process: what its environment must be, its exit codes, and what it says of errors.

Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped by a quality floor. Launchers of several processes start it as a
module: `accelerate launch -m layerpeel run ...`.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import sys
import tempfile
import traceback
import warnings

import torch

from layerpeel.cli.verbs import app
from layerpeel.errors import InputError, LayerpeelError, reason_of
from layerpeel.processes.progress import console, shown
from layerpeel.storage.files import disk_is_full

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # what it sets, and what no launcher means


def main() -> None:
    """The `layerpeel` command."""
    _quiet_libraries()
    try:
        _check_environment()
        app(standalone_mode=True)
    except LayerpeelError as error:
        console.print(f"[bold red]error:[/] {shown(error)}", soft_wrap=True)
        if error.hint:
            console.print(f"[bold]hint:[/] {shown(error.hint)}", soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as stop:
        console.print("stopped; run the same command again to go on from here")
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))
    except (torch.OutOfMemoryError, MemoryError) as error:
        console.print(f"[bold red]error:[/] out of memory{'' if isinstance(error, MemoryError) else ' on the GPU'}")
        console.print("[bold]hint:[/] lower distill.batch_size, distill.sequence_length or score.memory")
        sys.exit(1)
    except OSError as error:
        console.print(f"[bold red]error:[/] {shown(error)}", soft_wrap=True)
        if disk_is_full(error):
            console.print("[bold]hint:[/] free some space, then run the same command again")
        sys.exit(1)
    except Exception as error:
        console.print(f"[bold red]error:[/] a bug in layerpeel: {shown(reason_of(error))}", soft_wrap=True)
        console.print(f"[bold]hint:[/] please report it, with {shown(_keep_traceback())}", soft_wrap=True)
        sys.exit(1)


def _keep_traceback() -> str:
    """Writes where an error came from to a file of its own; gives its path."""
    with tempfile.NamedTemporaryFile("w", prefix="layerpeel-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"{platform.platform()}\n{traceback.format_exc()}")
    return file.name


def _check_environment() -> None:
    """Checks what a launcher of several processes sets, before a library stumbles over it."""
    numbers = {name: os.environ.get(name, default) for name, default in LAUNCHER.items()}
    for name, value in numbers.items():
        if not re.fullmatch("[0-9]{1,9}", value):
            raise InputError(f"environment: {name} is '{value}', expected a number", hint=f"unset {name}")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise InputError(
            f"environment: RANK is {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']} processes",
            hint="start several processes by torchrun or accelerate launch, or unset both",
        )
    if int(numbers["WORLD_SIZE"]) > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"environment: WORLD_SIZE is {numbers['WORLD_SIZE']}, and MASTER_ADDR is not set",
            hint="start several processes by torchrun or accelerate launch, or unset WORLD_SIZE",
        )


def _quiet_libraries() -> None:
    """Our own messages say what matters; those of the libraries beneath would bury them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # if it is not imported yet
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
