"""An optimizer's `state_dict` as tensors for a safetensors file and a description for JSON, and back.

Parameters are named, not numbered, and what FSDP2 splits is gathered, so that a state does not depend on how parameters
were grouped or split. Whatever the optimizer keeps comes back as it was: tensors of any shape and dtype, numbers, text,
lists, tuples and mappings of such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from layerpeel.errors import InputError
from layerpeel.processes.distributed import is_main_process

PLAIN = (bool, int, float, str, type(None))


def gather(value: Tensor) -> Tensor:
    """The tensor on the CPU, with the parts of all processes if it is split; all of them have to call this."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu().contiguous()


def gather_weights(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters on the CPU, in the first process; all of them have to call this."""
    gathered = {}
    for name, parameter in parameters.items():
        full = gather(parameter)  # of one at a time, in the others
        if is_main_process():
            gathered[name] = full
    return gathered


def place_as(parameter: Tensor, full: Tensor) -> Tensor:
    """A copy of what `gather` gave, where a parameter is, and split as it is."""
    if isinstance(parameter, DTensor):
        return _split_as(parameter, full, None)
    return full.to(parameter.device, copy=True)


def collect(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What the optimizers know of named parameters; all processes take part, the first gets the tensors.

    Returns:
        tensors by name, and for each optimizer a description that JSON takes, which refers to them.

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
    tensors: Mapping[str, Tensor],
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
        full = gather(value)
        if is_main_process():
            tensors[path] = full
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


def _decode(value: Any, tensor: Callable[[str], Tensor], parameter: nn.Parameter | None = None) -> Any:
    """What `_encode` was given, with tensors placed as the parameter is."""
    if isinstance(value, list):
        return [_decode(each, tensor, parameter) for each in value]
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _decode(each, tensor, parameter) for key, each in value["mapping"]}
    if "tuple" in value:
        return tuple(_decode(each, tensor, parameter) for each in value["tuple"])
    full = tensor(value["tensor"])
    return _split_as(parameter, full, value["split"]) if isinstance(parameter, DTensor) else full.clone()


def _split_as(parameter: DTensor, full: Tensor, split: list[int | None] | None) -> Tensor:
    """The tensor on a parameter's mesh, split as it was; if it was not, as the parameter is where shapes agree."""
    if split is None and full.shape != parameter.shape:
        return full.clone()
    placements = [Replicate() if dim is None else Shard(dim) for dim in split] if split else parameter.placements
    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, placements)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """The saved state with tensors where they were loaded to: `load_state_dict` casts their dtypes, and spoils text."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device) if loaded.dtype is not saved.dtype else loaded
    if isinstance(saved, Mapping):
        return {key: _as_saved(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(one, other) for one, other in zip(loaded, saved, strict=True))
    return saved
