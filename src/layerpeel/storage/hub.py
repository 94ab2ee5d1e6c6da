"""Whether the Hugging Face hub can be reached; where it cannot, its libraries go by their caches, and at once.

By themselves they find that out for each file anew, and wait for half a minute each time.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from pathlib import Path

from layerpeel.errors import reason_of
from layerpeel.processes.progress import print_once

PATIENCE = 10.0  # seconds, for an answer of any kind
KNOWN_FOR = 60.0  # seconds, before it is tried again

_offline_here: list[bool] = []  # not empty while libraries are offline because of what was found here


def is_hub_name(path: str | Path) -> bool:
    """Whether a path may name something on the hub: there is no such folder, and it has the form."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(path))
    except HFValidationError:
        return False
    return not os.path.isdir(path)


def use_cache_without_hub(path: str | Path | None = None) -> None:
    """Puts the hub's libraries into their offline mode if the hub cannot be reached, and back once it can be.

    To be called where something on the hub is about to be read. Leaves an offline mode that the user chose as it is.

    Args:
        path: of a model; nothing is done unless it may name one on the hub.
    """
    from huggingface_hub import constants

    if (constants.HF_HUB_OFFLINE and not _offline_here) or not (path is None or is_hub_name(path)):
        return
    reason = _why_unreachable(int(time.monotonic() / KNOWN_FOR))
    _offline_here[:] = [True] if reason else []
    _set_offline(bool(reason))
    if reason:
        print_once(f"the hub cannot be reached ({reason}): what was fetched from it before is used")


@cache
def _why_unreachable(_: int) -> str | None:
    """What a request to the hub fails with; None if it is answered, however.

    Args:
        _: the time, in units of `KNOWN_FOR`.
    """
    from huggingface_hub import constants, get_session

    _set_offline(False)  # or the session would refuse
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the client's transport raises many types, others in each version
        return f"{constants.ENDPOINT}: {reason_of(error)}"
    return None


def _set_offline(offline: bool) -> None:
    """Sets the switch that the libraries read of `HF_HUB_OFFLINE` when they are imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    datasets = sys.modules.get("datasets.config")
    if datasets and "HF_DATASETS_OFFLINE" not in os.environ:  # which would be the user's choice
        datasets.HF_HUB_OFFLINE = offline  # type: ignore[attr-defined]
