"""A linear map that reads bf16 weights and multiplies in fp32, compiled at first use for the CPU it runs on.

Decoding is bound by reading the weights. A CPU without bf16 instructions would have to keep them in fp32, twice the
bytes; this kernel widens them in registers instead. Every output is one chain of fused multiply-adds over the input
in its order, so a row's result is the same to the last bit whatever rows stand beside it.
Shapes: N rows, K inputs, M outputs; weights are stored [M / tile, K, tile], zero-padded to whole tiles.
"""

import ctypes
import functools
from pathlib import Path

import llvmlite.binding as llvm
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.models.bf16_kernel import VECTORS, worker_module

SERIAL_WORK = 1 << 16  # multiply-adds below which waking other threads costs more than it gains


class _Call(ctypes.Structure):
    """What the compiled worker reads: pointers to x [N, K], w [tiles, K, tile], y [N, tiles*tile], and sizes."""

    _fields_ = [(n, ctypes.c_void_p) for n in "xwy"] + [(n, ctypes.c_int64) for n in ("rows", "inputs", "tiles")]


class _Kernel:
    """The compiled worker and the OpenMP runtime that PyTorch itself runs on, whose threads it shares."""

    def __init__(self, openmp: ctypes.CDLL):
        features = llvm.get_host_cpu_features()
        # A tile's accumulators, two weight vectors and a broadcast must fit the 32 (AVX-512) or 16 vector registers.
        self.lanes, self.max_rows = (16, 12) if features.get("avx512f") else (8, 6)
        self.tile = VECTORS * self.lanes
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
        )
        names = ("omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value or 0 for name in names]
        module = llvm.parse_assembly(str(worker_module(self.lanes, self.max_rows, *addresses)))
        self._engine = llvm.create_mcjit_compiler(module, self._machine)
        self._engine.finalize_object()
        self.worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address("worker"))
        self._parallel = openmp.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._address = ctypes.cast(self.worker, ctypes.c_void_p)

    def run(self, x: Tensor, weight: Tensor, y: Tensor) -> None:
        tiles, inputs, _ = weight.shape
        call = _Call(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], inputs, tiles)
        if x.shape[0] * weight.numel() < SERIAL_WORK:
            self.worker(ctypes.addressof(call))
        else:
            self._parallel(self._address, ctypes.addressof(call), torch.get_num_threads(), 0)


@functools.cache
def _kernel() -> _Kernel | None:
    """The kernel for this CPU, or None where it cannot be had."""
    if not llvm.get_host_cpu_features().get("fma"):
        return None
    # The copy of libgomp that PyTorch brings and has already loaded; a second one would fight it for the cores.
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return _Kernel(ctypes.CDLL(str(found[0]))) if found else None


def available() -> bool:
    """Whether this CPU and this PyTorch can run the kernel (x86 with AVX2 or AVX-512, PyTorch on GNU OpenMP)."""
    return _kernel() is not None


class Bf16Linear:
    """Bias-free linear map on CPU: x [N, K] fp32 -> [N, M] fp32, weights in bf16."""

    def __init__(self, weight: Tensor):
        """weight [M, K] whose values are bf16 (any dtype). Raises RuntimeError where the kernel is not available."""
        kernel = _kernel()
        if kernel is None:
            raise RuntimeError("the bf16 kernel is not available on this machine")
        self._kernel, self.outputs = kernel, weight.shape[0]
        padded = F.pad(weight.to(torch.bfloat16), (0, 0, 0, -self.outputs % kernel.tile))
        self.weight = padded.view(-1, kernel.tile, weight.shape[1]).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.weight.shape[0] * self.weight.shape[2])
        self._kernel.run(x, self.weight, y)
        return y if y.shape[1] == self.outputs else y[:, : self.outputs].contiguous()
