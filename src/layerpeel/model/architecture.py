"""Finds the parts of a causal language model: its base model, its list of layers, and its final norm.

The table `FAMILIES` (families.py) says where a family keeps them. A family without a row is supported too, if one list
of layers and one norm are the only candidates. `config_check` then refuses removals that the config cannot express, and
`LayerInputRecorder` models that cannot be run layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.model.families import FAMILIES, Family

# Module attributes that hold the index of the layer they are in, for instance to index the KV cache.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")
# Attributes of modules outside the layers that are derived from the config's per-layer lists.
LIST_ATTRIBUTES = ("has_sliding_layers",)
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Architecture:
    """The parts of one causal language model.

    Attributes:
        base: the model without its head, such as `LlamaModel`.
        base_name: its name in the causal model, such as `model`.
        family: where the base model keeps its layers and final norm.
    """

    base: nn.Module
    base_name: str
    family: Family

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.get_submodule(self.family.layers)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, and so of the input."""
        return next(self.base.parameters()).device

    def set_layers(self, layers: list[nn.Module] | nn.ModuleList) -> None:
        parent, _, name = self.family.layers.rpartition(".")
        modules = layers if isinstance(layers, nn.ModuleList) else nn.ModuleList(layers)
        setattr(self.base.get_submodule(parent), name, modules)

    @property
    def norm(self) -> nn.Module:
        return self.base.get_submodule(self.family.norm)

    def layer_prefix(self) -> str:
        """The name of the layer list in the causal model's state dict, such as `model.layers`."""
        return f"{self.base_name}.{self.family.layers}"


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Finds the layers and the final norm of a causal language model.

    Raises:
        InputError: the family has no row and its layers or norm are ambiguous, or it has a row and this model lacks
            one of the parts.
    """
    family = FAMILIES.get(model.config.model_type) or _guess_family(model)
    name = family.base or model.base_model_prefix
    architecture = Architecture(model.get_submodule(name), name, family)
    for part in (family.layers, family.norm):
        try:
            exists = isinstance(architecture.base.get_submodule(part), nn.Module)
        except AttributeError:
            exists = False
        if not exists:
            raise InputError(
                f"this {model.config.model_type} model has no {name}.{part}, so it cannot be run layer by layer",
                hint="models of this family with a final norm are supported",
            )
    return architecture


def _guess_family(model: PreTrainedModel) -> Family:
    base, total = model.base_model, getattr(model.config, "num_hidden_layers", None)
    lists = [n for n, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m) == total]
    norms = [n for n, _ in base.named_children() if n in FINAL_NORM_NAMES]
    if len(lists) != 1 or len(norms) != 1:
        raise InputError(
            f"model family '{model.config.model_type}' is not known, and its layers cannot be found without doubt: "
            f"expected one list of {total} layers and one final norm in {type(base).__name__}, "
            f"found lists {lists} and norms {norms}",
            hint="`layerpeel families` lists the families with a row of their own",
        )
    return Family(layers=lists[0], norm=norms[0])


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
