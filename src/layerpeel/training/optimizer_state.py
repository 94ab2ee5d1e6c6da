"""An optimizer's `state_dict` as tensors for safetensors files and a description for JSON, and back.

Parameters are named, not numbered, and what FSDP2 splits is described as a whole, so that a state does not depend on
how parameters were grouped or split. Whatever the optimizer keeps comes back as it was: tensors of any shape and dtype,
numbers, text, lists, tuples and mappings of such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from layerpeel.errors import InputError
from layerpeel.training.split_tensors import from_part, part_of
from layerpeel.training.state_files import SavedTensor

PLAIN = (bool, int, float, str, type(None))


def place_as(parameter: Tensor, saved: SavedTensor) -> Tensor:
    """A copy of a saved tensor, where a parameter is, and split as it is."""
    if isinstance(parameter, DTensor):
        return _split_as(parameter, saved, None)
    return saved.full().to(parameter.device)


def collect(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What the optimizers know of named parameters.

    Returns:
        tensors by name, those of the optimizers themselves, split as they are; and for each optimizer a description
        that JSON takes, which refers to them.

    Raises:
        InputError: an optimizer keeps what cannot be saved.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    described = []
    for number, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        state = {order[key] if isinstance(key, int) else key: value for key, value in saved["state"].items()}
        groups = [group | {"params": [order[index] for index in group["params"]]} for group in saved["param_groups"]]
        described.append(
            {
                "state": {n: _encode(value, f"optimizer {number} {n}", tensors) for n, value in state.items()},
                "groups": [_encode(group, f"optimizer {number} group {i}", tensors) for i, group in enumerate(groups)],
            }
        )
    return tensors, described


def restore(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, SavedTensor],
    described: Sequence[Mapping[str, Any]],
) -> None:
    """Gives optimizers of the same parameters what `collect` returned; they may be grouped and split in another way."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer, description in zip(optimizers, described, strict=True):
        order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [_decode(group, tensors.__getitem__) for group in description["groups"]]
        group_of = {name: group for group in groups for name in group["params"]}
        index_of = {name: index for index, name in enumerate(order)}
        state = {
            index_of.get(key, key): _decode(value, tensors.__getitem__, parameters.get(key))
            for key, value in description["state"].items()
        }
        current = optimizer.state_dict()["param_groups"]
        new_groups = [group_of[order[group["params"][0]]] | {"params": group["params"]} for group in current]
        optimizer.load_state_dict({"state": state, "param_groups": new_groups})
        for name, index in index_of.items():
            if index in state:
                loaded = optimizer.state[parameters[name]]
                loaded.update(_as_saved(loaded, state[index]))


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value that JSON takes; tensors go into `tensors`, and those of DTensors with the dimension that is split."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        placements = value.placements if isinstance(value, DTensor) else None
        split = [each.dim if isinstance(each, Shard) else None for each in placements] if placements else None
        return {"tensor": path, "split": split}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _encode(each, f"{path} {key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(each, f"{path} {index}", tensors) for index, each in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if not isinstance(value, PLAIN):
        raise InputError(
            f"distill.optimizer: it keeps a {type(value).__name__}, which cannot be saved",
            hint="use an optimizer whose state_dict holds tensors, numbers, text, lists, tuples and mappings",
        )
    return value


def _decode(value: Any, tensor: Callable[[str], SavedTensor], parameter: nn.Parameter | None = None) -> Any:
    """What `_encode` was given, with tensors placed as the parameter is."""
    if isinstance(value, list):
        return [_decode(each, tensor, parameter) for each in value]
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _decode(each, tensor, parameter) for key, each in value["mapping"]}
    if "tuple" in value:
        return tuple(_decode(each, tensor, parameter) for each in value["tuple"])
    saved = tensor(value["tensor"])
    return _split_as(parameter, saved, value["split"]) if isinstance(parameter, DTensor) else saved.full()


def _split_as(parameter: DTensor, saved: SavedTensor, split: list[int | None] | None) -> Tensor:
    """The tensor on a parameter's mesh, split as it was; if it was not, as the parameter is where shapes agree."""
    if split is None and saved.shape != parameter.shape:
        return saved.full()
    placements = [Replicate() if dim is None else Shard(dim) for dim in split] if split else parameter.placements
    (placement,), mesh = placements, parameter.device_mesh
    if isinstance(placement, Shard):
        local = saved.narrow(placement.dim, *part_of(saved.shape[placement.dim], mesh))
    else:
        local = saved.full()
    return from_part(local.to(parameter.device), saved.shape, mesh, placements)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """The saved state with tensors where they were loaded to: `load_state_dict` casts their dtypes, and spoils text."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device) if loaded.dtype is not saved.dtype else loaded
    if isinstance(saved, Mapping):
        return {key: _as_saved(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(one, other) for one, other in zip(loaded, saved, strict=True))
    return saved
