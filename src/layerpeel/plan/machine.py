"""Plans of runs on this machine, or on another: a checked config, its teacher's config, and the speed of a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from layerpeel.config.run import RunConfig
from layerpeel.inference.requests import Request
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.plan.exchange import exchange_times
from layerpeel.plan.planning import Plan, plan_run
from layerpeel.plan.reading import DISK, seconds_to_read
from layerpeel.plan.shape import Shape
from layerpeel.plan.speed import Speed
from layerpeel.run.preflight import check_plan
from layerpeel.run.teacher_checks import read_for_plan

AT_ONCE = Speed(*[0.0] * 8)  # for plans that are asked of memory alone


class Planner:
    """Plans runs of one teacher in one dtype: what is read and timed for the first serves the others.

    Args:
        settings: the first run's.
        gpus: processes that share the work, one on each GPU; on a CPU they share the cores of this machine.
        fsdp: whether layers are split over them while they train.
        flops: of another machine: operations a second; this one is measured if not given.
        bandwidth: of that machine: bytes of memory a second.
        disk: of that machine: bytes of its disk a second.

    Raises:
        InputError: the model will not do.
    """

    def __init__(
        self,
        settings: RunConfig,
        *,
        gpus: int = 1,
        fsdp: bool = False,
        flops: float | None = None,
        bandwidth: float = 2e12,
        disk: float = DISK,
    ) -> None:
        self.settings, (self.teacher, self.tokenizer) = settings, read_for_plan(settings)
        self.gpus, self.fsdp, self.flops, self.bandwidth, self.disk = gpus, fsdp, flops, bandwidth, disk
        self.device = torch.device("cuda") if flops else pick_device(settings.device)
        self.speeds: dict[torch.dtype, Speed] = {}

    def plan(self, settings: RunConfig, requests: Sequence[Sequence[Request]], *, timed: bool = True) -> Plan:
        """Plans a run.

        Args:
            requests: of each task.
            timed: whether seconds are asked for; they are 0 otherwise, and nothing is timed.
        """
        dtype = wanted_dtype(self.teacher, self.device, settings.dtype)

        def speed(shape: Shape) -> Speed:
            if not timed:
                return AT_ONCE
            if dtype not in self.speeds:
                self.speeds[dtype] = self._speed(shape, settings, dtype)
            if settings.streams and not self.speeds[dtype].read:
                self.speeds[dtype] = replace(self.speeds[dtype], read=self._seconds_to_read(dtype))
            return self.speeds[dtype]

        return plan_run(
            self.teacher,
            settings,
            requests,
            speed,
            dtype=dtype,
            device=self.device.type,
            gpus=self.gpus,
            fsdp=self.fsdp,
        )

    def _seconds_to_read(self, dtype: torch.dtype) -> float:
        """For each parameter of a layer."""
        if self.flops:
            return dtype.itemsize / self.disk
        return seconds_to_read(self.settings.teacher, self.settings.revision, dtype)

    def _speed(self, shape: Shape, settings: RunConfig, dtype: torch.dtype) -> Speed:
        if self.flops:
            return Speed.of_processor(shape, self.flops, self.bandwidth, settings.distill)
        processes = self.gpus if self.device.type == "cpu" else 1
        with _cores_shared(processes) as waits:
            code = settings.trust_remote_code
            options = {"trust_remote_code": code, "split": self.fsdp and processes > 1}
            speed = Speed.measure(self.teacher, settings.distill, dtype, settings.device, **options)
            speed = speed.times(waits)
        if processes == 1:
            return speed
        add_up, gather = exchange_times(processes, split=self.fsdp)
        return replace(speed, add_up=add_up, gather=gather)


@contextmanager
def _cores_shared(processes: int) -> Iterator[float]:
    """For the time of the context, as many threads as each of so many processes of this machine may have.

    Gives how many times longer each takes where there are fewer cores than processes.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // processes))
    try:
        yield max(1.0, processes / cores)
    finally:
        torch.set_num_threads(cores)


def make_plan(
    settings: RunConfig, *, gpus: int, fsdp: bool, flops: float | None, bandwidth: float, disk: float = DISK
) -> Plan:
    """Plans a run, as `Planner` does, with the tasks of its config.

    Raises:
        InputError: the config, the model or the tasks will not do.
    """
    tasks = check_plan(settings)
    planner = Planner(settings, gpus=gpus, fsdp=fsdp, flops=flops, bandwidth=bandwidth, disk=disk)
    return planner.plan(settings, [task.requests(planner.tokenizer) for task in tasks])
