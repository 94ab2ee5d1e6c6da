"""Numbers of a run, sent to experiment trackers such as TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from layerpeel.config.run import RunConfig
from layerpeel.model.devices import pick_device
from layerpeel.processes.distributed import processes_of


class Tracker:
    """Sends numbers to the trackers that a config names (`trackers`); they start with the first numbers.

    Args:
        folder: where trackers write that write files.
        step: of the first numbers.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.config, self.folder, self.step = config, folder, step

    def log(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=self.step)
        self.step += 1

    @cached_property
    def _trackers(self) -> list[GeneralTracker]:
        processes_of(pick_device(self.config.device))  # trackers ask which process writes
        return [self._started(name) for name in self.config.trackers]

    def _started(self, name: str) -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        places = [str(self.folder)] if kind.requires_logging_directory else []
        tracker = kind("layerpeel", *places)
        tracker.start()
        return tracker
