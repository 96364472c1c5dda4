"""A CUDA GPU that is only pretended, so that a machine without one can find wrong devices and waits for the GPU.

A tensor "on the GPU" is a CPU tensor whose storage has a mark. Two modes of torch keep the mark: one answers what Python
asks and says of devices (``.device``, ``.to()``, ``device=``), the other sees each operation, those of the backward pass
included, and checks that its tensors are on one device. All values are real. So a whole run works, and its
weights must be those of a plain run, bit for bit.

It knows nothing of kernels, streams, CUDA graphs or memory, and Adam of torch asks for the real driver.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lifequant import train as training
from lifequant.data.task import Task

GPU = torch.device("cuda", 0)
# No call inside these may wait for the GPU.
STEP = (training.training_step.__code__, Task.training_batch.__code__)
# Operations whose result, or its shape, the host must know before it goes on.
READING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "histc", "repeat_interleave",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
OURS = ("/torch/", "/tests/support/", contextlib.__file__, mock.__file__)  # who only passes a call on
TRANSFERS = {"copy_", "_foreach_copy_", "_copy_from"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# What torch.cuda answers. Functions that aren't here would ask the driver.
ANSWERS = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
    "synchronize": None, "get_device_name": "pretended", "mem_get_info": (80 * 10**9, 80 * 10**9),
    "is_current_stream_capturing": False,
}  # fmt: skip


class GpuFault(AssertionError):
    """What fails on a GPU, or makes a training step wait for it."""


def _storage(t: Tensor | torch.UntypedStorage) -> torch.UntypedStorage:
    if isinstance(t, torch.UntypedStorage):
        return t
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # inside of vmap and grad
        t = torch._C._functorch.get_unwrapped(t)
    return t.untyped_storage()


def on_gpu(t: Tensor) -> bool:
    """Whether the tensor has the mark."""
    return getattr(_storage(t), "on_gpu", False)


def mark(t: Tensor, gpu: bool) -> None:
    """Say that the tensor, and all that shares its memory, is on the GPU or is not."""
    _storage(t).on_gpu = gpu


def _leaves(found: Any) -> Iterator[Any]:
    for x in found.values() if isinstance(found, dict) else found:
        if isinstance(x, list | tuple | dict):
            yield from _leaves(x)
        else:
            yield x


def tensors(*found: Any) -> list[Tensor]:
    return [x for x in _leaves(found) if isinstance(x, Tensor)]


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type == "cuda"


class Pretended:
    """What one run did: its ``faults``, the number of ``operations`` on the GPU, and of ``waits`` for it outside of steps."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.operations = self.waits = 0
        self.factory_on_gpu = False  # where a call that takes no tensor makes its result

    def fault(self, what: str) -> None:
        """Note it, since the library may catch the error, and raise it."""
        self.faults.append(f"{what} ({place()})")
        raise GpuFault(self.faults[-1])

    def wait(self, what: str) -> None:
        """The host waits for the GPU, which a training step must not do."""
        self.waits += 1
        if any(code in STEP for code in _codes()):
            self.fault(f"{what}: the training step waits for the GPU")

    def check(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether what the operation makes is on the GPU. Notes faults and waits."""
        given = tensors(args, kwargs)
        here = [on_gpu(t) for t in given]
        gpu = any(here) if given else self.factory_on_gpu
        if gpu and kwargs.get("generator") is not None:
            self.fault(f"{name}: a CPU generator for a tensor on the GPU")
        if not any(here):
            return gpu
        if name in READING:
            self.wait(name)
        if name in INDEXING:
            return self.check_index(name, *args[:3])
        if name in TRANSFERS:
            return self.check_transfer(name, *args[:2], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        scalars_pass = name not in ("cat", "stack") and (here[0] or not name.endswith("_"))
        counted = {gpu for t, gpu in zip(given, here, strict=True) if gpu or t.dim() or not scalars_pass}
        if len(counted) > 1:  # a CPU tensor without dimensions may join those on the GPU, as a number may
            places = [f"{list(t.shape)} on the {'GPU' if g else 'CPU'}" for t, g in zip(given, here, strict=True)]
            self.fault(f"{name}: tensors on different devices: {', '.join(places[:4])}")
        return gpu

    def check_index(self, name: str, values: Tensor, indices: list[Tensor | None], new: Tensor | None = None) -> bool:
        """The device of ``values``. An index on the CPU is sent to it; a mask is counted by the host."""
        gpu, indices = on_gpu(values), [i for i in indices if i is not None]
        if not gpu and any(map(on_gpu, indices)):
            self.fault(f"{name}: a CPU tensor indexed by one on the GPU")
        if new is not None and new.dim() and on_gpu(new) != gpu:
            self.fault(f"{name}: values from another device")
        masked = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        filled = new is not None and not new.dim() and not on_gpu(new) and len(indices) == 1  # masked_fill does that
        if gpu and (not all(map(on_gpu, indices)) or (masked and not filled)):
            self.wait(f"{name}: a mask, or an index on the CPU")
        return gpu

    def check_transfer(self, name: str, target: Any, source: Any, non_blocking: bool = False) -> bool:
        """The device of ``target``. From pinned memory, and where the call asks for it, nobody waits."""
        target, source = tensors(target), tensors(source)
        for a, b in zip(target, source, strict=True):
            if on_gpu(a) != on_gpu(b) and not (non_blocking and getattr(_storage(b), "pinned", False)):
                self.wait(f"{name} between CPU and GPU")
        return on_gpu(target[0])


def _codes() -> Iterator[CodeType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def place() -> str:
    """File, line and function of the innermost call that is neither torch's nor a stand-in's."""
    frame = sys._getframe(1)
    while any(part in frame.f_code.co_filename for part in OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/lifequant/', 1)[-1]}:{frame.f_lineno}, {frame.f_code.co_name}"


class Operations(TorchDispatchMode):
    """Checks each operation and marks what it makes."""

    def __init__(self, gpu: Pretended) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            gpu = self.gpu.check(func._schema.name.split("::")[1], args, kwargs)
            self.gpu.operations += gpu
            given = _leaves((args, kwargs))  # what shares memory with these has its mark already
            known = {_storage(x)._cdata for x in given if isinstance(x, Tensor | torch.UntypedStorage)}
            result = func(*args, **kwargs)
            for t in tensors(result):
                if _storage(t)._cdata not in known:
                    mark(t, gpu)
        return result


class Devices(TorchFunctionMode):
    """Answers for devices: torch itself never hears of the GPU."""

    def __init__(self, gpu: Pretended) -> None:
        super().__init__()
        self.gpu = gpu
        self.answers: dict[Any, Callable] = {
            Tensor.to: self.to,
            Tensor.cpu: lambda t: self.move(t, False),
            Tensor.cuda: lambda t, *_, **more: self.move(t, True, **more),
            Tensor.pin_memory: self.pin,
            Tensor.is_pinned: lambda t: getattr(_storage(t), "pinned", False),
            Tensor.__deepcopy__: self.deepcopy,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":
            asked = {Tensor.device: GPU, Tensor.is_cuda: True, Tensor.is_cpu: False}.get(func.__self__)
            return func(*args, **kwargs) if asked is None or not on_gpu(args[0]) else asked
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and on_gpu(args[0]):
            self.gpu.fault("numpy() of a tensor on the GPU")
        if func is Tensor.tolist and on_gpu(args[0]):
            self.gpu.wait("tolist()")
        given = tensors(args, kwargs)
        device = kwargs.get("device")
        gpu = any(map(on_gpu, given)) if device is None else _is_gpu(device)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        former, self.gpu.factory_on_gpu = self.gpu.factory_on_gpu, gpu
        try:
            result = func(*args, **kwargs)
        finally:
            self.gpu.factory_on_gpu = former
        if device is not None and isinstance(result, Tensor):
            if gpu and func in (torch.tensor, torch.as_tensor):
                self.gpu.wait("a tensor of the host's numbers")
            mark(result.clone() if any(result is t for t in given) else result, gpu)
        return result

    def to(self, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to in all its spellings."""
        if args and isinstance(args[0], Tensor):
            return self.move(t, on_gpu(args[0]), args[0].dtype)
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        gpu = on_gpu(t) if device is None else device.type == "cuda"
        return self.move(t, gpu, dtype, non_blocking, copy, memory_format)

    def move(
        self, t: Tensor, gpu: bool, dtype: Any = None, non_blocking: bool = False, copy: bool = False, form: Any = None
    ) -> Tensor:
        """``t`` itself where nothing changes, else a copy that is marked."""
        form = form or torch.preserve_format
        if on_gpu(t) == gpu:
            return t.to(dtype=dtype or t.dtype, copy=copy, memory_format=form)
        if not (non_blocking and getattr(_storage(t), "pinned", False)):
            self.gpu.wait(f"to() to the {'GPU' if gpu else 'CPU'}")
        moved = t.to(dtype=dtype or t.dtype, copy=True, memory_format=form)
        mark(moved, gpu)
        return moved

    def pin(self, t: Tensor, *_: Any) -> Tensor:
        """A copy in pinned memory."""
        if on_gpu(t):
            self.gpu.fault("pin_memory() of a tensor on the GPU")
        pinned = t.clone()
        _storage(pinned).pinned = True
        return pinned

    def deepcopy(self, t: Tensor, memo: dict) -> Tensor:
        """Copies the storage past the operations."""
        copied = Tensor.__deepcopy__(t, memo)
        mark(copied, on_gpu(t))
        return copied


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Pretended]:
    """Inside, torch finds one GPU. Raises GpuFault at each fault, and at the end if the library caught one."""
    gpu, autocast, save = Pretended(), torch.autocast, torch.save

    def checked_save(state: Any, *args: Any, **kwargs: Any) -> None:
        if any(map(on_gpu, tensors(state))):
            gpu.fault("torch.save() of tensors on the GPU: without one, torch.load() refuses the file")
        save(state, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, value in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value, **__: value))
        on_cpu = lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs)  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "autocast", on_cpu))
        stack.enter_context(mock.patch.object(torch, "save", checked_save))
        stack.enter_context(Operations(gpu))
        stack.enter_context(Devices(gpu))
        yield gpu
    if gpu.faults:
        raise GpuFault("\n".join(gpu.faults))
