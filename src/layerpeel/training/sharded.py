"""Weights that are split between processes while they train one student (FSDP2).

Each process holds its part of each layer, of the teacher's and of the student's, and of the gradients and the optimizer
state of what trains in them, and a layer is gathered where it runs. So are frozen embeddings and heads.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from layerpeel.errors import InputError
from layerpeel.processes.malloc import large_blocks_given_back
from layerpeel.training.recipe import MASTER_DTYPE
from layerpeel.training.split_tensors import split_tensor
from layerpeel.training.student import Student


def _check_torch() -> None:
    """Refuses versions of torch, up to 2.7, that cannot add gradients up over processes instead of averaging them."""
    if not hasattr(fsdp.FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(
            f"--use_fsdp: torch {torch.__version__} is too old to split layers", hint="take torch 2.8 or newer"
        )


def splits_layers() -> bool:
    """Whether training splits layers over the processes: under `accelerate launch --use_fsdp`."""
    return distributed.is_initialized() and parse_flag_from_env("ACCELERATE_USE_FSDP")


@contextmanager
def sharded(student: Student, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the context, splits the weights over the processes, under `accelerate launch --use_fsdp`.

    Stand-ins whose parameters are split (FSDP2) run in the place of the layers: one for teacher and student where they
    have the same weights, else one for each. What trains has `MASTER_DTYPE` in them. The layers themselves have no
    weights meanwhile, and have them again afterwards, with what was trained; those that are streamed are on the disk.
    Frozen embeddings and heads are whole where they run; what trains outside of layers is whole in each process.

    After an exception the layers have their trained weights as they were before, and nothing else that was split is
    there: other processes may be elsewhere, and would not answer if they were asked for their parts. Such a teacher has
    to be loaded again.

    Args:
        weights: the trained parameters by name, as they were before.

    Raises:
        InputError: this torch is too old.
    """
    if not splits_layers():
        yield
        return
    _check_torch()
    with large_blocks_given_back() if student.model.device.type == "cpu" else nullcontext():
        mesh = init_device_mesh(student.model.device.type, (distributed.get_world_size(),))
        layers, ends = SplitLayers(student, weights, mesh), SplitEnds(student, weights, mesh)
        layers.put()
        ends.put()
        try:
            yield
        except BaseException:
            layers.take_out()
            ends.take_out()
            for name, parameter in student.parameters().items():
                if name in weights and not parameter.numel():
                    parameter.data = weights[name].to(parameter)
            raise
        layers.take_out()
        ends.take_out()
        layers.give_weights()
        ends.give_weights()


def gather_without_waiting(student: Student) -> None:
    """Lets a GPU gather each split layer while the one before computes; to be called before a micro-batch.

    Each is a root to FSDP2, which would gather it after all that the GPU was asked for before, lest that change its
    weights. In a micro-batch nothing does, so it need wait only for what was asked for until now, such as the step.
    """
    stand_ins = {*student.teacher.stand_ins.values(), *student.layerwise.stand_ins.values()}
    if stand_ins and student.model.device.type == "cuda":
        event = torch.cuda.current_stream(student.model.device).record_event()
        for layer in stand_ins:
            layer.set_post_optim_event(event)  # type: ignore[operator]


class SplitEnds:
    """Frozen embeddings and heads, which may be tied, split over the processes by their first dimension.

    Wherever a model has one, it has no numbers, or another parameter with all of them while that is gathered.

    Args:
        trained: names of the parameters that will train.
    """

    def __init__(self, student: Student, trained: Collection[str], mesh: DeviceMesh) -> None:
        self.student, named = student, student.parameters()
        models, trains = (student.teacher.model, student.model), {named[name] for name in trained}
        self._embeddings, self._heads = (
            list(dict.fromkeys(p for module in modules for p in module.parameters() if p.dim() and p not in trains))
            for modules in ([m.get_input_embeddings() for m in models], [m.get_output_embeddings() for m in models])
        )
        self._parts: dict[nn.Parameter, Any] = {}
        for parameter in (*self._embeddings, *self._heads):
            if parameter not in self._parts:
                self._parts[parameter] = nn.Parameter(split_tensor(parameter.detach(), mesh), requires_grad=False)
                parameter.data = parameter.data.new_empty(0)
        self._places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {parameter: [] for parameter in self._parts}
        for module in (module for model in models for module in model.modules()):
            for name, value in module._parameters.items():
                if value in self._places:
                    self._places[value].append((module, name))

    def put(self) -> None:
        """Lets the student gather them where they run."""
        self.student.embeddings_loaded = partial(self._gathered, self._embeddings)
        self.student.heads_loaded = partial(self._gathered, self._heads)

    def take_out(self) -> None:
        """Lets the student take them as they are."""
        self.student.embeddings_loaded = self.student.heads_loaded = nullcontext

    def give_weights(self) -> None:
        """Makes them whole again; all processes have to call it."""
        for parameter, part in self._parts.items():
            parameter.data = part.full_tensor()

    @contextmanager
    def _gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """A context in which some are whole; a graph that was made in it keeps what it needs of them."""
        for parameter in parameters:
            self._take_place(parameter, nn.Parameter(self._parts[parameter].full_tensor(), requires_grad=False))
        try:
            yield
        finally:
            for parameter in parameters:
                self._take_place(parameter, parameter)

    def _take_place(self, parameter: nn.Parameter, other: nn.Parameter) -> None:
        for module, name in self._places[parameter]:
            module._parameters[name] = other


class SplitLayers:
    """Stand-ins for the layers of a teacher and its student, split over the processes; the layers lose their weights.

    One layer after the other is split, so that no more than one is in memory twice.

    Args:
        trained: names of the parameters that will train.

    Attributes:
        of_teacher, of_student: by position; the same module where both have the same weights.
    """

    def __init__(self, student: Student, trained: Collection[str], mesh: DeviceMesh) -> None:
        self.student, self.trained, self._loaded = student, trained, student.teacher.weights_loaded
        self.of_teacher: dict[int, nn.Module] = {}
        self.of_student: dict[int, nn.Module] = {}
        self._mesh = mesh
        for index in range(len(student.teacher.layers)):
            self._split_layer(index)
        student.teacher.drop_read_ahead()  # each was read once, and the first would stay for all of the training
        stand_ins = [*self.of_teacher.values(), *self.of_student.values()]
        if hasattr(fsdp, "share_comm_ctx"):  # or each keeps its gradients to the end, and buffers on streams of its own
            fsdp.share_comm_ctx(list(dict.fromkeys(stand_ins)))  # type: ignore[arg-type]
        self._set_prefetched()

    def _split_layer(self, index: int) -> None:
        """Splits a layer of the teacher, and the student's version of it."""
        student, teacher = self.student, self.student.teacher
        position = student.kept_layers.position(index) if index in student.kept_layers.kept else None
        with teacher.weights_loaded(index):
            self.of_teacher[index] = self._split(teacher.layers[index], {})
            if position is not None and index in student.changed_layers:
                prefix = f"{student.layerwise.architecture.layer_prefix()}.{index}."
                named = {name.removeprefix(prefix) for name in self.trained if name.startswith(prefix)}
                with student.layer_loaded(position):
                    self.of_student[position] = self._split(student.layer(index), named)
            elif position is not None:
                self.of_student[position] = self.of_teacher[index]
        for layer in (teacher.layers[index], *([] if position is None else [student.layer(index)])):
            for parameter in layer.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.new_empty(0)

    def _split(self, layer: nn.Module, trained: Collection[str]) -> nn.Module:
        """A copy of a layer with its parameters split; those that are named train."""
        memo: dict[int, Tensor] = {id(buffer): buffer for buffer in layer.buffers()}
        for name, parameter in layer.named_parameters():
            value = parameter.detach().to(MASTER_DTYPE) if name in trained else parameter.detach()
            memo[id(parameter)] = nn.Parameter(value, requires_grad=name in trained)
        stand_in = copy.deepcopy(layer, memo)  # type: ignore[arg-type]
        options: dict[str, Any] = {}
        if trained and (narrow := self.student.model.dtype) is not MASTER_DTYPE:
            # Matrices are gathered as autocast would take them; it takes vectors in fp32, which are too few to split.
            options["mp_policy"] = fsdp.MixedPrecisionPolicy(narrow, MASTER_DTYPE, cast_forward_inputs=False)
            options["ignored_params"] = {p for p in stand_in.parameters() if p.requires_grad and p.dim() < 2}
        # Said, or FSDP2 would keep all layers whole after the forward pass: each is called by itself, as a root.
        split = fsdp.fully_shard(stand_in, mesh=self._mesh, reshard_after_forward=True, **options)
        split.set_gradient_divide_factor(1.0)  # gradients add up: losses are shares of the step's
        split.set_force_sum_reduction_for_comms(True)
        if hasattr(split, "set_reduce_scatter_unused_params"):  # such as an expert that no token of a process went to
            split.set_reduce_scatter_unused_params(True)
        return stand_in

    def _set_prefetched(self) -> None:
        """In the backward pass, the layer below is gathered while one runs, down to the first that trains."""
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in self.of_student.values()]
        first = 0 if self.student.trains_embeddings or True not in trains else trains.index(True)
        for position, layer in self.of_student.items():
            below = self.of_student[position - 1] if position > first else layer  # itself: nothing more
            layer.set_modules_to_backward_prefetch([below])  # type: ignore[operator]

    def put(self) -> None:
        """Lets the stand-ins run in the place of the layers."""
        teacher, student = self.student.teacher, self.student.layerwise
        teacher.stand_ins, student.stand_ins, teacher.weights_loaded = self.of_teacher, self.of_student, self._gathered

    def take_out(self) -> None:
        """Lets the layers run themselves again."""
        teacher, student = self.student.teacher, self.student.layerwise
        teacher.stand_ins, student.stand_ins, teacher.weights_loaded = {}, {}, self._loaded

    def _gathered(self, index: int) -> AbstractContextManager[Any]:
        """A context in which a layer that teacher and student share is gathered once for both, where it first runs."""
        layer = self.of_teacher[index]
        return _kept_whole(layer) if layer in self.of_student.values() else nullcontext()

    @torch.no_grad()
    def give_weights(self) -> None:
        """Gives the layers their weights again, in the dtypes that they had; all processes have to call it."""
        teacher, student = self.student.teacher.layers, self.student.layerwise.layers
        for layers, stand_ins in ((teacher, self.of_teacher), (student, self.of_student)):
            for position, stand_in in stand_ins.items():
                for parameter, part in zip(layers[position].parameters(), stand_in.parameters(), strict=True):
                    if not parameter.numel():  # shared ones once; what is streamed stays on the disk
                        value = part.detach().to(parameter.dtype)
                        parameter.data = value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def _kept_whole(layer: Any) -> Iterator[None]:
    """While the context lasts, an FSDP2 module that has run stays whole."""
    layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        layer.set_reshard_after_forward(True)
        layer.reshard()
