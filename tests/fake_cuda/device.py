"""A CUDA device that is not there: it computes on the CPU, and notices what a GPU would not forgive.

Under `fake_cuda()`, tensors "on cuda:0" are `CudaTensor`s around a tensor on the CPU. Operations that mix them with
tensors of the CPU raise, as on a GPU, and what would be a kernel, a wait of the host for the device, or a copy from
host to device is counted, with the line of layerpeel that asked for it.

Torch registers such a device once for the whole process (`PrivateUse1`), so tests use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

REGISTERED = "fakecuda"  # what torch calls the device inside
FREE, TOTAL = 60 * 2**30, 80 * 2**30  # bytes of memory


def _words(text: str) -> set[str]:
    return set(text.split())


# Operations of ATen that hand their result, or its size, to the host.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_consecutive", "_unique2"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}

# Operations that autocast runs in the low precision, and those that it runs in float32 (torch's documentation of amp).
LOWERED = _words(
    """linear matmul mm bmm addmm addbmm baddbmm mv chain_matmul einsum conv1d conv2d conv_transpose1d prelu
    scaled_dot_product_attention __matmul__ __rmatmul__"""
)
RAISED = _words(
    """exp expm1 log log10 log1p log2 softmax log_softmax logsumexp softplus rsqrt reciprocal pow __pow__ __rpow__ sum
    prod cumsum cumprod norm layer_norm group_norm cross_entropy nll_loss mse_loss kl_div cosine_similarity acos asin
    cosh sinh tan erfinv dist"""
)


class _Backend(_DummyBackendModule):
    """What torch asks of the module `torch.fakecuda`."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        """Random numbers are the CPU's."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs behind the host's back."""

    def is_autocast_enabled(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(REGISTERED, backend_module=_Backend())
INSIDE, OUTSIDE = torch.device(REGISTERED, 0), torch.device("cuda", 0)


def _histogram(values: Tensor, *options: Any) -> Tensor:
    """`histc`, which counts integers on GPUs alone."""
    return torch.histc(values.float(), *options).to(values.dtype)


@dataclass
class FakeCuda:
    """What was asked of the device, by place in layerpeel.

    Attributes:
        launches: kernels; attention counts as one, as its fused kernels are.
        syncs: the host waits for a result.
        copies: from host to device; those from pinned memory are in `pinned_copies`, too.
        autocast_dtype: in the contexts of `torch.autocast("cuda")`; None outside of them.
    """

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    pinned_copies: Counter[str] = field(default_factory=Counter)
    autocast_dtype: torch.dtype | None = None
    pinned: dict[int, Tensor] = field(default_factory=dict)

    def reset(self) -> None:
        for counter in (self.launches, self.syncs, self.copies, self.pinned_copies):
            counter.clear()

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name).total() for name in ("launches", "syncs", "copies")}


_devices: list[FakeCuda] = []


def _place() -> str:
    """The line of layerpeel that is running; `autograd` in a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition("/layerpeel/")
        if package:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


class CudaTensor(torch.Tensor):
    """A tensor that says cuda:0, and whose numbers are in `host`, on the CPU."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> CudaTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=INSIDE,
        )
        tensor.host = host
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return OUTSIDE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, CudaTensor):
            raise RuntimeError(f"the data of a tensor on cuda:0 cannot be a tensor on {value.device}")
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.host = value.host

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        """Memory is freed by the CPU's allocator."""

    def tolist(self) -> Any:
        _devices[-1].syncs[_place()] += 1
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.host!r} on cuda:0"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of a device that is no longer there")


class _Kernels(TorchDispatchMode):
    """Runs the operations of `CudaTensor`s on the tensors inside them."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        _mapped((args, kwargs), tensors.append)
        wanted = kwargs.get("device")
        to_gpu = wanted is not None and torch.device(wanted).type == REGISTERED
        if not to_gpu and not any(isinstance(tensor, CudaTensor) for tensor in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self._check_devices(func, name, args, tensors)
        if wanted is None or torch.device(wanted).type != "meta":  # which takes no numbers along
            self._count(func, name, args, wanted is not None and not to_gpu)
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        wrappers = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}
        args, kwargs = _mapped((args, kwargs), lambda tensor: getattr(tensor, "host", tensor))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            result = _histogram(*args) if name == "histc" else func(*args, **kwargs)
        if (wanted is not None and not to_gpu) or (name == "copy_" and id(args[0]) not in wrappers):
            return result  # to the CPU
        result = _mapped(result, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else CudaTensor(tensor))
        if isinstance(result, CudaTensor) and result.shape != result.host.shape:
            raise NotImplementedError(f"{func} changes a shape in place")
        return result

    def _check_devices(self, func: OpOverload, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Raises where operands are on both devices; those without dimensions may be, and indices."""
        if name in COPIES or not any(isinstance(tensor, CudaTensor) for tensor in tensors):
            return
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and tensor.dim()]
        if name in INDEXING and isinstance(args[0], CudaTensor):
            values = args[2] if len(args) > 2 else None
            if not on_cpu or not any(tensor is values for tensor in on_cpu):
                self.gpu.copies[_place()] += len(on_cpu)
                return
        if on_cpu:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func}, {_place()})"
            )

    def _count(self, func: OpOverload, name: str, args: Any, to_cpu: bool) -> None:
        place = _place()
        if name in COPIES:
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
            from_gpu = isinstance(source, CudaTensor)
            if from_gpu and (to_cpu or (target is not None and not isinstance(target, CudaTensor))):
                self.gpu.syncs[place] += 1
            elif not from_gpu:
                self.gpu.copies[place] += 1
                self.gpu.pinned_copies[place] += source.data_ptr() in self.gpu.pinned
            else:
                self.gpu.launches[place] += 1
            return
        by_mask = name in INDEXING and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])
        self.gpu.syncs[place] += name in WAITS or by_mask
        self.gpu.launches[place] += not (func.is_view or name in NO_KERNEL)


class _Names(TorchFunctionMode):
    """Lets "cuda" in arguments mean the registered device, and casts as autocast does."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(map(_inside, args))
        kwargs = {key: _inside(value) for key, value in kwargs.items()}
        if self.gpu.autocast_dtype and name in LOWERED | RAISED:
            dtype = self.gpu.autocast_dtype if name in LOWERED else torch.float32
            args, kwargs = _mapped((args, kwargs), lambda tensor: _cast(tensor, dtype))
        if func is torch.Tensor.pin_memory or kwargs.pop("pin_memory", False):
            tensor = args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs)
            self.gpu.pinned[tensor.data_ptr()] = tensor
            return tensor
        if func is torch.Tensor.is_pinned:
            return args[0].data_ptr() in self.gpu.pinned
        if func is torch.tensor and kwargs.get("device") == INSIDE:
            return func(*args, **(kwargs | {"device": "cpu"})).to(INSIDE)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], CudaTensor):
            args = (args[0], _index_on_gpu(args[1]), *args[2:])
        if name == "scaled_dot_product_attention":
            before = self.gpu.launches.copy()
            result = func(*args, **kwargs)
            self.gpu.launches = before + Counter({_place(): 1})
            return result
        return func(*args, **kwargs)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device):
        return INSIDE if value.type == "cuda" else value
    return INSIDE if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    floats = isinstance(tensor, CudaTensor) and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if floats else tensor


def _mapped(value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    """Arguments or results, with a function applied to their tensors."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, of_tensor) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(item, of_tensor) for name, item in value.items()}
    return value


def _index_on_gpu(index: Any) -> Any:
    """An index whose lists are tensors on the device, where torch itself would put them."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, list) for part in parts):
        return index
    return tuple(torch.tensor(part).to(INSIDE) if isinstance(part, list) else part for part in parts)


_Autocast = torch.autocast
_is_autocast_enabled, _get_autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


class _FakeAutocast(contextlib.ContextDecorator):
    """`torch.autocast`, which for "cuda" sets what `_Names` casts to."""

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any
    ) -> None:
        self.real = None if device_type == "cuda" else _Autocast(device_type, dtype, enabled, **options)
        self.dtype = (dtype or torch.float16) if enabled else None
        self.before: list[torch.dtype | None] = []

    def __enter__(self) -> Any:
        if self.real:
            return self.real.__enter__()
        self.before.append(_devices[-1].autocast_dtype)
        _devices[-1].autocast_dtype = self.dtype
        return self

    def __exit__(self, *error: Any) -> Any:
        if self.real:
            return self.real.__exit__(*error)
        _devices[-1].autocast_dtype = self.before.pop()
        return None


class FakeStream:
    """A stream, or an event on one: all of them are done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited = 0

    def wait_stream(self, stream: Any) -> None:
        self.waited += 1

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> FakeStream:
        return FakeStream()

    def record(self, stream: Any = None) -> None:
        """The event happens at once."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


def _patches(gpu: FakeCuda) -> dict[str, Any]:
    """What torch says of its CUDA devices, by name."""
    properties = SimpleNamespace(total_memory=TOTAL, major=9, minor=0, name="FAKE")
    constants = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "mem_get_info": (FREE, TOTAL),
        "empty_cache": None,
        "synchronize": None,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "get_device_name": "FAKE",
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "set_device": None,
        "_lazy_init": None,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_stream": FakeStream(),
    }
    patches: dict[str, Any] = {f"cuda.{name}": _always(value) for name, value in constants.items()}
    patches |= {"cuda.Stream": FakeStream, "cuda.Event": FakeStream, "cuda.stream": contextlib.nullcontext}
    patches |= {"cuda.device": contextlib.nullcontext, "autocast": _FakeAutocast, "amp.autocast": _FakeAutocast}

    def enabled(device_type: str = "cuda") -> bool:
        return gpu.autocast_dtype is not None if device_type == "cuda" else _is_autocast_enabled(device_type)

    def dtype(device_type: str) -> torch.dtype:
        return gpu.autocast_dtype or torch.float16 if device_type == "cuda" else _get_autocast_dtype(device_type)

    return patches | {"is_autocast_enabled": enabled, "get_autocast_dtype": dtype}


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


_real_to = PreTrainedModel.to


def _to(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """`model.to`, which keeps tied parameters tied, as it does where parameters change their device in place."""
    if not any(_inside(value) is INSIDE for value in (*args, *kwargs.values())):
        return _real_to(model, *args, **kwargs)
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.to(*args, **kwargs), parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(*args, **kwargs)
    return model


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Puts the device into the machine for the time of the context."""
    gpu = FakeCuda()
    _devices.append(gpu)
    with contextlib.ExitStack() as stack:
        for name, value in _patches(gpu).items():
            stack.enter_context(mock.patch(f"torch.{name}", value))
        stack.enter_context(mock.patch.object(PreTrainedModel, "to", _to))
        stack.enter_context(_Kernels(gpu))
        stack.enter_context(_Names(gpu))
        try:
            yield gpu
        finally:
            _devices.pop()
