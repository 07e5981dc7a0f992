"""A device that is not the CPU, where there is none: it computes on the CPU, but by the rules of one.

Tensors of both in one operation are an error, as with CUDA, NumPy sees none of its tensors, and none of what is made
for CPUs runs. So what runs here finds its way on a GPU; how fast, and by which kernels, it does not tell.

python -m tests.elsewhere FOLDER '["data", "--prompts", ...]' '["train", ...]' ...   # commands, run there
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "elsewhere"
CPU = torch.device("cpu")
ACROSS = (aten.copy_.default, aten._to_copy.default)  # may have tensors of both
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # take indices from the CPU
IN_BF16 = (aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.scaled_dot_product_attention)  # by autocast
KEPT: list[torch.library.Library] = []  # what is registered ends with its library


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    for x in values:
        if isinstance(x, list | tuple):
            yield from leaves(x)
        else:
            yield x


def held(x: Any) -> Any:
    """With the tensors that are held in place of those that hold them."""
    if isinstance(x, list | tuple):
        return type(x)(map(held, x))
    return x.held if isinstance(x, Elsewhere) else x


def moved(x: Any) -> Any:
    """With tensors that hold them in place of what was computed."""
    if isinstance(x, list | tuple):
        return type(x)(map(moved, x))
    return Elsewhere(x) if isinstance(x, Tensor) else x


class Elsewhere(Tensor):
    """A tensor on the device; `held` is on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func is aten._copy_from.default:
            source, to = (t.held if isinstance(t, cls) else t for t in args[:2])
            to.copy_(source)
            return args[1]
        operands = [t for t in leaves((*args, *kwargs.values())) if isinstance(t, Tensor)]
        if func not in ACROSS:
            on_cpu = [t for t in operands if not isinstance(t, cls) and t.dim()]
            if func in INDEXING:
                on_cpu = [t for t in on_cpu if t.dtype not in (torch.int64, torch.bool)]
            if on_cpu:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and {NAME}")
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        here = kwargs | {"device": CPU} if "device" in kwargs else kwargs
        result = func(*map(held, args), **{name: held(x) for name, x in here.items()})
        if to_cpu:
            return result
        if func is aten.copy_.default:
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, moved(result))

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {NAME} device type tensor to numpy")
        return self.held.detach().numpy()

    def tolist(self):
        return self.held.tolist()


class Device(TorchDispatchMode):
    """Makes tensors on the device that come from no other tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type != "cpu"
        if made_there or any(isinstance(t, Elsewhere) for t in leaves((*args, *kwargs.values()))):
            return Elsewhere.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


class Stream(contextlib.nullcontext):
    def synchronize(self): ...
    def wait_stream(self, other: "Stream"): ...


class Backend(_DummyBackendModule):
    """`torch.elsewhere`"""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> Stream:
        return stream

    Stream = current_stream


def dispatched(op: Any):
    return lambda *args, **kwargs: Elsewhere.__torch_dispatch__(op, (), args, kwargs)


def autocast(op: Any):
    key = torch._C.DispatchKey.AutocastPrivateUse1  # pyright: ignore

    def lowered(*args: Any, **kwargs: Any):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            floats = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
            return op(*(a.to(torch.bfloat16) if f else a for a, f in zip(args, floats, strict=True)), **kwargs)

    return lowered


def register() -> Device:
    """Make the device known, for the whole process; enter what comes back. Before `dspark` is imported."""
    torch.inference_mode = torch.no_grad  # inference tensors cannot be held by others
    torch.accelerator.synchronize = lambda device=None: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _setup_privateuseone_for_python_backend(NAME, Backend())
    every, single = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda op, *args, **kwargs: Elsewhere.__torch_dispatch__(op, (), args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for op in IN_BF16:
        single.impl(op.default, autocast(op.default), "AutocastPrivateUse1")
    for op in (aten.empty.memory_format, aten.empty_strided.default, aten._copy_from.default):  # of `torch.tensor`
        single.impl(op, dispatched(op), "PrivateUse1")
    KEPT.extend((every, single))
    return Device()


if __name__ == "__main__":
    with register():
        from dspark.cli import main

        os.chdir(sys.argv[1])
        for command in sys.argv[2:]:
            if failed := main([*json.loads(command), "--device", NAME]):
                sys.exit(failed)
