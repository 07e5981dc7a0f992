"""Operations of the decoder compiled at first use for the CPU they run on, in fp32.

Decoding a token is bound by reading the weights and, once those are read fast, by the cost of starting hundreds of
small operations. Here weights are read in bf16 and multiplied by the CPU's bf16 dot products or, where it has none,
widened in registers (other libraries would keep them in fp32, twice the bytes), and each operation is one call.
Threads are those of PyTorch's own OpenMP. A row's result is the same to the last bit whatever rows stand beside it:
the base of the batch-invariant mode.
Shapes: N rows, K inputs, M outputs, H query heads, KV key-value heads, D head width.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm
import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from dspark.models import cpu_kernels
from dspark.models.cpu_kernels import VECTORS, Machine

SERIAL_WORK = 1 << 16  # multiply-adds below which waking other threads costs more than it gains


class _Compiler:
    """LLVM for this CPU, and the OpenMP runtime whose threads the kernels share with PyTorch."""

    def __init__(self, openmp: ctypes.CDLL):
        features = llvm.get_host_cpu_features()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._target_machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
        )
        self._parallel = openmp.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        names = ("omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value or 0 for name in names]
        wide = bool(features.get("avx512f"))
        dots = bool(features.get("avx512bf16"))
        self.machine = Machine(16 if wide else 8, 32 if wide else 16, dots, *addresses)
        self._engines = []

    def compile(self, module: ir.Module) -> Callable[[bool, int], None]:
        """run(parallel, address of the arguments) of the module's `kernel`."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), self._target_machine)
        engine.finalize_object()
        self._engines.append(engine)  # the code lives as long as its engine
        address = engine.get_function_address("kernel")
        serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

        def run(parallel: bool, arguments: int) -> None:
            if parallel:
                self._parallel(address, arguments, torch.get_num_threads(), 0)
            else:
                serial(arguments)

        return run


@functools.cache
def _compiler() -> _Compiler | None:
    if not llvm.get_host_cpu_features().get("fma"):
        return None
    # The copy of libgomp that PyTorch brings and has already loaded; a second one would fight it for the cores.
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return _Compiler(ctypes.CDLL(str(found[0]))) if found else None


def available() -> bool:
    """Whether this CPU and this PyTorch can run the kernels (x86 with AVX2 or AVX-512, PyTorch on GNU OpenMP)."""
    return _compiler() is not None


def usable(x: Tensor) -> bool:
    """Whether `x` is what the kernels work on."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and available()


@functools.cache
def _kernel(name: str, *shape: int | float) -> Callable[[bool, int], None]:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("compiled operations are not available on this machine")
    return compiler.compile(getattr(cpu_kernels, f"{name}_kernel")(compiler.machine, *shape))


def _call(kernel: Callable[[bool, int], None], work: int, *arguments: int) -> None:
    packed = (ctypes.c_int64 * len(arguments))(*arguments)  # pointers and sizes are all 8 bytes
    kernel(work >= SERIAL_WORK, ctypes.addressof(packed))


class CompiledLinear:
    """Bias-free linear map: x [N, K] fp32 -> [N, M] fp32, weights in bf16 or fp32.

    With bf16 weights on a CPU with AVX512-BF16, x is rounded to bf16 too where K is a multiple of 16.
    """

    def __init__(self, weight: Tensor):
        """weight [M, K] in the dtype to keep it in. Raises RuntimeError where kernels are not available."""
        compiler = _compiler()
        if compiler is None:
            raise RuntimeError("compiled operations are not available on this machine")
        self.outputs, self.inputs = weight.shape
        in_bf16, lanes = weight.dtype is torch.bfloat16, compiler.machine.lanes
        self.rounds_inputs = in_bf16 and compiler.machine.bf16_dots and self.inputs % lanes == 0
        self._kernel = _kernel("linear", "dots" if self.rounds_inputs else "widened" if in_bf16 else "fp32")
        step, tile = 2 if self.rounds_inputs else 1, VECTORS * lanes
        padded = F.pad(weight, (0, 0, 0, -self.outputs % tile))
        self._tiles, self._padded = len(padded) // tile, len(padded)
        # [M / tile, K / step, tile, step]: a tile's weights are read as one stream
        self.weight = padded.view(self._tiles, tile, -1, step).transpose(1, 2).contiguous()
        self._pointer = self.weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows = x.shape[0]
        y = x.new_empty(rows, self._padded)
        scratch = x.new_empty(torch.get_num_threads() * x.numel() // 2 if self.rounds_inputs else 0)
        pointers = x.data_ptr(), self._pointer, y.data_ptr(), scratch.data_ptr()
        _call(self._kernel, rows * self._padded * self.inputs, *pointers, rows, self.inputs, self._tiles)
        return y if self._padded == self.outputs else y[:, : self.outputs].contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, C] contiguous -> [N, C]."""
    rows, width = x.shape
    y = torch.empty_like(x)
    _call(_kernel("rms_norm", width, eps), x.numel() * 4, x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows)
    return y


def rotate_(heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first `count` heads of heads [N, >= count, D] in place by cos, sin [N, 1, D] (see `rotary_table`)."""
    rows, _, head_dim = heads.shape
    work = rows * count * head_dim * 4
    pointers = heads.data_ptr(), cos.data_ptr(), sin.data_ptr()
    _call(_kernel("rotary", count, head_dim), work, *pointers, heads.stride(0), rows)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2*M] contiguous -> silu(gate) * up [N, M]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    _call(_kernel("silu_mul", width), y.numel() * 16, gate_up.data_ptr(), y.data_ptr(), rows)
    return y


@dataclass
class Runs:
    """For each of N rows the cache slots it attends to: first_slots [N] and lengths [N] int64, and the longest."""

    first_slots: Tensor
    lengths: Tensor
    longest: int


def attend_rows(q: Tensor, kv: Tensor, runs: Runs) -> Tensor:
    """q [N, H, D] (heads contiguous) over kv [slots, 2, KV, D] -> [N, H*D]; row i sees its own run of slots."""
    rows, heads, head_dim = q.shape
    kv_heads = kv.shape[2]
    span = runs.longest + 16  # room for one vector past the end
    out = q.new_empty(rows, heads * head_dim)
    scores = q.new_empty(rows * heads * span)
    pointers = [t.data_ptr() for t in (q, kv, out, scores, runs.first_slots, runs.lengths)]
    kernel = _kernel("attention", kv_heads, heads // kv_heads, head_dim)
    _call(kernel, out.numel() * runs.longest, *pointers, q.stride(0), span, rows * kv_heads)
    return out
