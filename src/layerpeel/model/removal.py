"""Removing layers from a checkpoint on disk: tensors are copied from file to file, and no model is built with weights.

Whether the config can say the removal is checked on the meta device, where tensors have shapes and no bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from layerpeel.errors import RunError, reason_of
from layerpeel.model.architecture import count_parameters, find_architecture
from layerpeel.model.building import build_model
from layerpeel.model.checkpoint import check_weights, stored_dtype
from layerpeel.model.checkpoint_keys import predicts_further
from layerpeel.model.config_check import check_config, first_difference
from layerpeel.model.layer_cycles import broken_cycle
from layerpeel.model.layer_names import LayerNames
from layerpeel.model.loading import TeacherOptions, load_config_of, load_model, load_without_bytes
from layerpeel.model.new_tensors import SHARD_SIZE, NewTensor, check_written, write_tensors
from layerpeel.model.origin import Origin, origin_of
from layerpeel.model.saved_config import SavedConfig, student_config, write_fields
from layerpeel.model.saving import save_model
from layerpeel.model.side_files import carry_files, drop_absent_code, left_files
from layerpeel.model.surgery import KeptLayers, remove_layers
from layerpeel.model.tensor_files import StoredTensor
from layerpeel.processes.progress import progress
from layerpeel.storage.files import partial_of, replace_folder, sync_folder


@dataclass(frozen=True)
class Removal:
    """What a removal did.

    Attributes:
        layers: which of the teacher's are left.
        parameters: of the student; tied ones count once.
        teacher_parameters: of the teacher.
        kept: how many tensors were copied as they were.
        dropped: how many were not, by what they are of.
        changed: by the field of config.json, what was and what is.
        carried: names of the files that were copied beside the weights.
        left: names of files of the teacher that do not hold of the student.
        broken_cycle: what the removal means for other runtimes, if it breaks a cycle of layers.
    """

    layers: KeptLayers
    parameters: int
    teacher_parameters: int
    kept: int
    dropped: dict[str, int]
    changed: dict[str, tuple[Any, Any]]
    carried: list[str]
    left: list[str]
    broken_cycle: str | None


def remove_from_files(
    path: str | Path,
    layers: Iterable[int],
    folder: Path,
    *,
    shard_size: int = SHARD_SIZE,
    replaced: Mapping[str, Callable[[], Tensor]] | None = None,
    **options: Unpack[TeacherOptions],
) -> Removal:
    """Writes a checkpoint without some of a model's layers, whole or not at all.

    Args:
        path: a folder or a hub name.
        layers: to remove, counted from 0.
        folder: where to write; nothing may be there.
        shard_size: bytes of a file, beyond which the next one begins.
        replaced: reads other values of tensors, by the names that these have in the model's files.
        options: how the model is read; see `load_model`.

    Raises:
        InputError: no such model, no such layer, or the removal cannot be said by the model's config.
        RunError: what was written is not what was meant.
    """
    code = options.get("trust_remote_code", False)
    config = load_config_of(path, **options)
    check_weights(config, path)
    teacher = outline(config, code)
    kept = KeptLayers.full(len(find_architecture(teacher).layers)).without(layers)
    origin = origin_of(path, **options).with_layers(kept.kept)
    names = origin.names(find_architecture(teacher), kept.total)
    if origin.is_quantised or names is None or options.get("merge_adapter"):  # not the files' tensors
        assert not replaced
        return _remove_in_memory(path, origin, kept, folder, options)
    student = check_config(teacher, list(kept.kept))
    load_without_bytes(origin.folder, config, path, trust_remote_code=code)
    tensors, dropped = _plan(origin, names, kept, teacher, replaced or {})
    sizes = count_parameters(student), count_parameters(teacher)
    saved = student_config(origin.fields, config, kept.kept, origin.dtype)
    carried = _write(origin, tensors, saved, student, folder, shard_size)
    left, cycle = left_files(origin.folder, code=code), broken_cycle(config, kept.kept)
    copied = len(tensors) - len(replaced or ())
    return Removal(kept, *sizes, copied, dropped, saved.changed, carried, left, cycle)


def outline(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model without weights, whose forward can be recorded: its layers are on the meta device.

    All other parameters are a single zero each, seen as a whole tensor, so that they take no memory.
    """
    with init_empty_weights(include_buffers=False):
        model = build_model(config, trust_remote_code=trust_remote_code)
    model.tie_weights()  # each parameter that goes to the meta device becomes one of its own
    in_layers = {id(parameter) for parameter in find_architecture(model).layers.parameters()}
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in in_layers:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = stand_ins.setdefault(id(parameter), nn.Parameter(zeros, requires_grad=False))
    return model


def _plan(
    origin: Origin,
    names: LayerNames,
    kept: KeptLayers,
    teacher: PreTrainedModel,
    replaced: Mapping[str, Callable[[], Tensor]],
) -> tuple[list[NewTensor], dict[str, int]]:
    """Which tensors are written, under which names; and how many are dropped, by what they are of."""
    dropped: dict[str, int] = {}
    tensors = []
    twice = _twice(origin, teacher)
    for name, stored in origin.tensors.items():
        layer = names.layer_of(name)
        if layer is not None and layer < kept.total and layer not in kept.kept:
            reason = "layers that were removed"
        elif (layer is not None and layer >= kept.total) or predicts_further(name):
            reason = "modules that predict further tokens"
        elif name in twice:
            reason = "copies of a tied tensor"
        else:
            new = name if layer is None else names.renumbered(name, kept.position(layer))
            read = replaced.get(name)
            tensors.append(NewTensor.made(new, stored, read) if read else NewTensor.copied(new, stored))
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    return tensors, dropped


def _twice(origin: Origin, model: PreTrainedModel) -> set[str]:
    """Names of tensors that the files hold though they are tied to another with the same bytes."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    copies = set()
    for one, other in tied.items():
        first = [name for name in origin.tensors if name == one or name.endswith(f".{one}")]
        second = [name for name in origin.tensors if name == other or name.endswith(f".{other}")]
        if len(first) == len(second) == 1 and _same_bytes(origin.tensors[first[0]], origin.tensors[second[0]]):
            copies.add(first[0])
    return copies


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one == other:
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))


def _write(
    origin: Origin,
    tensors: list[NewTensor],
    saved: SavedConfig,
    student: PreTrainedModel,
    folder: Path,
    shard_size: int,
) -> list[str]:
    """Writes the checkpoint beside its place, checks it, and puts it there; gives the names of files it carried."""
    unfinished = partial_of(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        with progress("copying", sum(tensor.size for tensor in tensors)) as advance:
            write_tensors(unfinished, tensors, shard_size=shard_size, on_written=advance)
        carried = carry_files(origin.folder, unfinished, code=origin.code)
        drop_absent_code(saved.fields, unfinished)
        write_fields(saved.fields, unfinished)
        with ThreadPoolExecutor(2) as disk:  # these wait for it, while the third computes
            waiting = disk.submit(sync_folder, unfinished), disk.submit(check_written, unfinished, tensors)
            _check_loads(unfinished, origin, student)
            for each in waiting:
                each.result()
        replace_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return carried


def _check_loads(folder: Path, origin: Origin, student: PreTrainedModel) -> None:
    """Checks that transformers makes the meant model of a folder, of all of its tensors and of no others.

    Raises:
        RunError: it does not.
    """
    try:
        config = load_config_of(folder, trust_remote_code=origin.code)
        loaded = load_without_bytes(folder, config, folder, trust_remote_code=origin.code)
        difference = first_difference(loaded, student)
    except Exception as error:  # whatever transformers, or the family's code, finds wrong with it
        difference = f"an error ({reason_of(error)})"
    if difference:
        raise RunError(
            f"the checkpoint without these layers would load with {difference}; nothing was written",
            hint="remove other layers, or report this with the model's config.json",
        )


def _remove_in_memory(
    path: str | Path, origin: Origin, kept: KeptLayers, folder: Path, options: TeacherOptions
) -> Removal:
    """As `remove_from_files`, by loading the model: where its tensors have to be converted."""
    model, tokenizer = load_model(path, device="cpu", **options)
    before = count_parameters(model)
    cycle = broken_cycle(model.config, kept.kept)
    remove_layers(model, kept.removed)
    save_model(model, tokenizer, folder, stored_dtype(origin.folder), origin)
    after, tensors = count_parameters(model), len(model.state_dict())
    return Removal(kept, after, before, tensors, {}, {}, [], left_files(origin.folder), cycle)
