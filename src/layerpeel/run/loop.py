"""The loop of the paper (arXiv 2511.05085): score, remove, repair, train, evaluate, record, until a stop holds."""

from __future__ import annotations

from layerpeel.config.run import RunConfig
from layerpeel.run.folder import Run
from layerpeel.run.opening import open_run
from layerpeel.run.peeling import Peeling
from layerpeel.run.preflight import check_run


def peel(config: RunConfig, *, accept_changes: bool = False) -> Run:
    """Makes the teacher shallower until a stop of the config holds; goes on with a run that was interrupted.

    Args:
        accept_changes: goes on with a run of another config where its rounds still hold (see `run.opening.FIXED`).

    Raises:
        InputError: the config, the model or the data will not do; found before any long work.
        RunError: training diverged, the disk is full, or the run's files are damaged.
        Interrupted: SIGINT or SIGTERM came, and all that was done is saved (where this is the main thread).
    """
    tasks = check_run(config)
    with open_run(config, tasks, accept_changes=accept_changes) as run:
        if not run.finish:
            _peel(Peeling(run, config, tasks))
    return run


def _peel(peeling: Peeling) -> None:
    peeling.begin()
    while not (reason := peeling.stop_reason()):
        layer = peeling.score()
        peeling.remove(layer)
        repair = peeling.repair(layer)
        training = peeling.train()
        evaluation = peeling.evaluate()
        peeling.record(repair, training, evaluation)
    peeling.finish(reason)
