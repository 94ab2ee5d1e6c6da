"""The student, which shares the teacher's frozen layers: one copy of the weights.

The student is a model of its own class, with its own config and layer list, whose parameters *are* the teacher's, but
for those in training, which are copies. Below the first that differs, both compute the same, and it runs once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.streaming import lacks_weights
from layerpeel.model.surgery import KeptLayers, remove_layers, share
from layerpeel.model.tensor_files import StoredTensor


class Student:
    """A shortened model that shares all weights with its teacher but those that are trained.

    Parameters are named as in the teacher, such as `model.layers.7.mlp.up_proj.weight`, whatever has been removed.

    Attributes:
        model: the student, a plain transformers model.
        layerwise: the student, to be run layer by layer.
        teacher: the teacher, to be run layer by layer.
        kept_layers: which teacher layers the student still has.
        trained: names of the parameters that are the student's own copies.
        replaced: where parameters lie that differ from the teacher's and are not in memory, by name, where weights are
            streamed; those in `trained` count first.
        embeddings_loaded, heads_loaded: contexts in which both models have what runs before their layers, and their
            heads, while these are split over processes.
    """

    def __init__(self, teacher: PreTrainedModel | LayerwiseModel) -> None:
        self.teacher = teacher if isinstance(teacher, LayerwiseModel) else LayerwiseModel(teacher)
        self.model = share(self.teacher.model).requires_grad_(False)
        loaded = (self.layer_loaded, self.teacher.drop_read_ahead) if self.teacher.streamed else ()
        self.layerwise = LayerwiseModel(self.model, *loaded)
        self.kept_layers = KeptLayers.full(len(self.layerwise.layers))
        self.trained: set[str] = set()
        self.replaced: Mapping[str, StoredTensor] = {}
        self.embeddings_loaded: Callable[[], AbstractContextManager[None]] = nullcontext
        self.heads_loaded: Callable[[], AbstractContextManager[None]] = nullcontext

    def layer(self, index: int) -> nn.Module:
        """The student's version of a teacher layer."""
        return self.layerwise.layers[self.kept_layers.position(index)]

    def is_streamed(self, position: int) -> bool:
        """Whether a layer has weights that are neither in memory now nor split over the processes."""
        return position not in self.layerwise.stand_ins and lacks_weights(self.layerwise.layers[position])

    @contextmanager
    def layer_loaded(self, position: int) -> Iterator[None]:
        """Loads a layer's weights, and those of the teacher's, while the context lasts, unless they are there."""
        if not self.is_streamed(position):
            yield
            return
        layer, index = self.layerwise.layers[position], self.kept_layers.kept[position]
        prefix = f"{self.layerwise.architecture.layer_prefix()}.{index}."

        def take(state: Mapping[str, Tensor]) -> None:
            shared = {name: value for name, value in state.items() if prefix + name not in self.trained}
            layer.load_state_dict(shared, strict=False, assign=True)

        with self.teacher.weights_loaded(index):
            state = self.teacher.layers[index].state_dict()
            replaced = {name: self.replaced[prefix + name] for name in state if prefix + name in self.replaced}
            take(state | {name: stored.read().to(state[name].device) for name, stored in replaced.items()})
            try:
                yield
            finally:
                take({name: value.to("meta") for name, value in layer.state_dict().items()})

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name; tied ones once, and those of layers that are split as they are split."""
        prefix, stand_ins = f"{self.layerwise.architecture.layer_prefix()}.", self.layerwise.stand_ins
        named = {}
        for name, parameter in self.model.named_parameters():
            if name.startswith(prefix):
                position, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{self.kept_layers.kept[int(position)]}.{rest}"
                parameter = stand_ins[int(position)].get_parameter(rest) if stand_ins else parameter
            named[name] = parameter
        return named

    def layer_of(self, name: str) -> int | None:
        """The teacher layer that a parameter is of; None if it is of no layer."""
        match = re.match(re.escape(self.layerwise.architecture.layer_prefix()) + r"\.(\d+)\.", name)
        return int(match[1]) if match else None

    def remove(self, layers: Iterable[int]) -> None:
        """Removes teacher layers from the student; the teacher stays as it is."""
        layers = list(layers)
        kept_layers = self.kept_layers.without(layers)
        remove_layers(self.model, [self.kept_layers.position(layer) for layer in layers])
        self.kept_layers = kept_layers
        self.trained = {name for name in self.trained if self.layer_of(name) not in layers}
        self.replaced = {name: stored for name, stored in self.replaced.items() if self.layer_of(name) not in layers}

    def fork(self) -> Student:
        """Another student of the same teacher, at the same point, to try something on."""
        other = Student(self.teacher)
        other.remove(self.kept_layers.removed)
        other.replaced = self.replaced
        other.load_trained(self.trained_state())
        return other

    def add_trained(self, names: Iterable[str]) -> None:
        """Gives the student its own copy of these parameters, to be trained."""
        new = set(names) - self.trained
        positions = {layer: self.kept_layers.position(layer) for layer in map(self.layer_of, new) if layer is not None}
        streamed = {layer: position for layer, position in positions.items() if self.is_streamed(position)}
        self._copy({name for name in new if self.layer_of(name) not in streamed})
        for layer, position in streamed.items():
            with self.layer_loaded(position):
                self._copy({name for name in new if self.layer_of(name) == layer})

    def _copy(self, names: set[str]) -> None:
        """Puts copies in the place of parameters."""
        parameters = self.parameters()
        copies = {
            id(parameters[name]): nn.Parameter(parameters[name].detach().clone(), requires_grad=False) for name in names
        }
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in copies:
                    module._parameters[name] = copies[id(parameter)]
        self.trained |= names

    def drop_trained(self, layer: int) -> None:
        """Gives the student the teacher's weights in a layer again."""
        in_layer = {name for name in self.trained if self.layer_of(name) == layer}
        of_teacher = dict(self.teacher.model.named_parameters())
        for name in in_layer:
            path, _, last = name.rpartition(".")
            inner = path.removeprefix(f"{self.layerwise.architecture.layer_prefix()}.{layer}.")
            self.layer(layer).get_submodule(inner)._parameters[last] = of_teacher[name]
        self.trained -= in_layer

    @property
    def trains_embeddings(self) -> bool:
        """Whether the student has embeddings of its own, so that it shares nothing with the teacher's forward."""
        after = [*self.layerwise.norm_module.parameters(), *self.layerwise.head_module.parameters()]
        before = {id(p) for p in self.model.get_input_embeddings().parameters()}
        late = {id(p) for p in after} - before
        parameters = self.parameters()
        return any(self.layer_of(name) is None and id(parameters[name]) not in late for name in self.trained)

    @property
    def changed_layers(self) -> set[int | None]:
        """The teacher layers in which the student has other weights; None among them for those outside of layers."""
        return {self.layer_of(name) for name in (*self.trained, *self.replaced)}

    @property
    def shared_prefix(self) -> int:
        """How many of the first layers teacher and student both run, with the same weights, on the same input."""
        if self.trains_embeddings:
            return 0
        kept, changed = self.kept_layers.kept, self.changed_layers
        first = next((position for position, layer in enumerate(kept) if layer in changed), len(kept))
        return min(first, self.kept_layers.first_changed)

    def trained_state(self) -> dict[str, Tensor]:
        """The trained weights, by name."""
        parameters = self.parameters()
        return {name: parameters[name].detach() for name in sorted(self.trained)}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Takes over weights that `trained_state` gave."""
        self.add_trained(state)
        parameters = self.parameters()
        for name, value in state.items():
            parameters[name].copy_(value)

    def keep_on_disk(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Takes over weights from where they lie: those of layers are read when they run, as where layers are streamed.

        Args:
            tensors: by name; those of layers take the place of what is in memory of these.
        """
        inside = {name: stored for name, stored in tensors.items() if self.layer_of(name) is not None}
        self.load_trained({name: stored.read() for name, stored in tensors.items() if name not in inside})
        self.replaced = {**self.replaced, **inside}
        for layer in {layer for name in inside if (layer := self.layer_of(name)) is not None}:
            self.drop_trained(layer)
