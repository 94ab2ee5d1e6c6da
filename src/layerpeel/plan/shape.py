"""The sizes of a model, from its config; no weights are read or allocated."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from layerpeel.inference.budget import bytes_of_token
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.architecture import count_parameters, find_architecture
from layerpeel.model.building import build_model
from layerpeel.model.config_check import has_own_code
from layerpeel.model.config_fields import rewrite_config, text_config
from layerpeel.model.layer_inputs import replaced_forward
from layerpeel.model.surgery import KeptLayers
from layerpeel.training.recipe import MASTER_DTYPE, autocast
from layerpeel.training.student import Student


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        layers, width, vocabulary: L, D, V.
        parameters: of the model, tied ones once.
        layer_parameters: of the largest layer.
        inner: what enters the widest projection to the hidden states, that of the MLP.
        head_parameters: of the head, though tied.
        itemsize: bytes of a frozen parameter.
        kept: bytes that a layer keeps for its backward pass, for each token of a training batch.
        cache: bytes of keys and values of one token in one layer.
    """

    layers: int
    width: int
    vocabulary: int
    parameters: int
    layer_parameters: int
    inner: int
    head_parameters: int
    itemsize: int
    kept: float
    cache: int

    def tokens_within(self, budget: int, branches: int) -> int:
        """How many tokens of a batch fit into so many bytes, each of them on all branches."""
        return budget // bytes_of_token(branches, self.width, self.itemsize)


def empty_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, on the meta device."""
    with init_empty_weights():
        model = build_model(config, dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


class Outline(Student):
    """A student whose parameters and layers can be listed but not run: its model may be on the meta device."""

    def __init__(self, model: PreTrainedModel, removed: Iterable[int]) -> None:
        """Takes the layers out of the model."""
        architecture = find_architecture(model)
        layers = architecture.layers
        self.model, self.trained, self.replaced = model, set(), {}
        self.kept_layers = KeptLayers.full(len(layers)).without(removed)
        architecture.set_layers([layers[layer] for layer in self.kept_layers.kept])
        self.layerwise = LayerwiseModel.__new__(LayerwiseModel)  # its `__init__` would run the model
        self.layerwise.model, self.layerwise.architecture, self.layerwise.stand_ins = model, architecture, {}

    def is_streamed(self, position: int) -> bool:
        """Never: what is on the meta device stays there."""
        return False


def shape_of(model: PreTrainedModel, rows: int, length: int, *, split: bool = False) -> Shape:
    """The sizes of a model that may be on the meta device.

    Args:
        rows, length: of a training batch.
        split: whether layers are split over processes, so that their matrices are gathered in the model's dtype, and
            autocast makes no copies of them.
    """
    config, layers = text_config(model.config), find_architecture(model).layers
    queries = getattr(config, "num_attention_heads", None) or 0  # recurrent models have none
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, queries)
    return Shape(
        layers=len(layers),
        width=config.hidden_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        parameters=count_parameters(model),
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        inner=max(size for layer in layers for size in _inner_sizes(layer, config.hidden_size)),
        head_parameters=sum(p.numel() for p in model.get_output_embeddings().parameters()),
        itemsize=model.dtype.itemsize,
        kept=_kept_bytes(model, rows, length, split=split) / (rows * length),
        cache=2 * heads * size * model.dtype.itemsize,
    )


def _inner_sizes(layer: nn.Module, width: int) -> list[int]:
    """The other sizes of a layer's matrices to or from the hidden states; the width itself, if it has none."""
    shapes = [tuple(parameter.shape) for parameter in layer.parameters() if parameter.dim() == 2]
    return [width, *(max(shape) for shape in shapes if width in shape)]


def _kept_bytes(model: PreTrainedModel, rows: int, length: int, *, split: bool) -> int:
    """Bytes that one layer saves for its backward pass, counted on fake tensors; the layer trains as in `Trainer`."""
    config, dtype = copy.deepcopy(model.config), model.dtype
    rewrite_config(text_config(config), [text_config(config).num_hidden_layers // 2])
    kept: dict[int, torch.UntypedStorage] = {}
    shared: set[int] = set()  # by all layers: masks, rotary embeddings

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        one_layer = build_model(config, dtype, trust_remote_code=has_own_code(model)).requires_grad_(False)
        architecture = find_architecture(one_layer)
        layer = architecture.layers[0]
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype if split and parameter.dim() > 1 else MASTER_DTYPE)
            parameter.requires_grad_(True)
        run = layer.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            shared.update(_storage(leaf) for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return run(*args, **kwargs)

        with replaced_forward(layer, recorded), autocast("cpu", dtype):
            architecture.base(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
        not_counted = shared | {_storage(tensor) for tensor in [*one_layer.parameters(), *one_layer.buffers()]}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in not_counted)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
