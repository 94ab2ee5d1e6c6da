"""What the command `plan` puts together: a checked config, its teacher's config, and the speed of a machine."""

from __future__ import annotations

import torch

from layerpeel.config.run import RunConfig
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.plan.planning import Plan, plan_run
from layerpeel.plan.shape import Shape
from layerpeel.plan.speed import Speed
from layerpeel.run.preflight import check_plan
from layerpeel.run.teacher_checks import read_for_plan


def make_plan(settings: RunConfig, *, gpus: int, fsdp: bool, flops: float | None, bandwidth: float) -> Plan:
    """Plans a run on this machine, or on another.

    Args:
        gpus: processes that share the work, one on each GPU.
        fsdp: whether what trains is split over them.
        flops: of another machine: operations a second; this one is measured if not given.
        bandwidth: of that machine: bytes of memory a second.

    Raises:
        InputError: the config, the model or the tasks will not do.
    """
    tasks = check_plan(settings)
    teacher, tokenizer = read_for_plan(settings)
    device = torch.device("cuda") if flops else pick_device(settings.device)
    dtype = wanted_dtype(teacher, device, settings.dtype)

    def speed(shape: Shape) -> Speed:
        if flops:
            return Speed.of_processor(shape, flops, bandwidth, settings.distill)
        return Speed.measure(teacher, settings.distill, dtype, settings.device)

    return plan_run(
        teacher,
        settings,
        [task.requests(tokenizer) for task in tasks],
        speed,
        dtype=dtype,
        device=device.type,
        gpus=gpus,
        fsdp=fsdp,
    )
