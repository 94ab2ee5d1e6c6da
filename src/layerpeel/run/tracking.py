"""Numbers of a run, sent to experiment trackers such as TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator

from layerpeel.config.run import RunConfig
from layerpeel.model.devices import pick_device


class Tracker:
    """Sends numbers to the trackers that a config names (`trackers`); they start with the first numbers.

    Args:
        folder: where trackers write that write files.
        step: of the first numbers.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.config, self.folder, self.step = config, folder, step

    def log(self, values: Mapping[str, float]) -> None:
        if self.config.trackers:
            self._accelerator.log(dict(values), step=self.step)
            self.step += 1

    @cached_property
    def _accelerator(self) -> Accelerator:
        accelerator = Accelerator(
            cpu=pick_device(self.config.device).type == "cpu",
            log_with=self.config.trackers,
            project_dir=str(self.folder),
        )
        accelerator.init_trackers("layerpeel")
        return accelerator
