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
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dspark.models import cpu_attention, cpu_draw, cpu_kernels, cpu_linear, cpu_verdict
from dspark.models.cpu_emitter import Machine
from dspark.models.cpu_linear import TILE_INPUTS, TILE_ROWS, VECTORS, tile_config
from dspark.sampling import least_exponent
from dspark.spec.draft import Draft

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
        names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
        addresses = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value or 0 for name in names]
        wide = bool(features.get("avx512f"))
        dots = bool(features.get("avx512bf16"))
        tiles = dots and bool(features.get("amx-bf16")) and _may_use_tiles()
        self.machine = Machine(16 if wide else 8, 32 if wide else 16, dots, tiles, *addresses)
        self._engines = []

    def compile(self, code: str) -> "Kernel":
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), self._target_machine)
        engine.finalize_object()
        self._engines.append(engine)  # the code lives as long as its engine
        return Kernel(engine.get_function_address("kernel"), self._parallel)


Field = int | Tensor  # of a kernel: a size, or where a tensor's memory begins


class Kernel:
    """Compiled code at `address`, called with its fields."""

    def __init__(self, address: int, parallel: Callable):
        self.address, self._parallel = address, parallel
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def __call__(self, work: int, *fields: Field) -> None:
        """work: about how many multiply-adds it is, which decides whether other threads help."""
        words = [f.data_ptr() if isinstance(f, Tensor) else f for f in fields]
        packed = (ctypes.c_int64 * len(words))(*words)  # pointers and sizes are all 8 bytes
        if work >= SERIAL_WORK:
            self._parallel(self.address, ctypes.addressof(packed), torch.get_num_threads(), 0)
        else:
            self._serial(ctypes.addressof(packed))


def _may_use_tiles() -> bool:
    """Ask Linux for the AMX registers, which a process must do once before it touches them."""
    if platform.system() != "Linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _openmp() -> Path | None:
    """The copy of libgomp that PyTorch brings and has already loaded; a second one would fight it for the cores."""
    return min((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), default=None)


@functools.cache
def available() -> bool:
    """Whether this CPU and this PyTorch can run the kernels (x86 with AVX2 or AVX-512, PyTorch on GNU OpenMP)."""
    return bool(llvm.get_host_cpu_features().get("fma")) and _openmp() is not None


@functools.cache
def compiler() -> _Compiler:
    """Of this process, with what the CPU can do in `machine`. Raises RuntimeError where kernels cannot run."""
    if not available():
        raise RuntimeError("compiled operations are not available on this machine")
    return _Compiler(ctypes.CDLL(str(_openmp())))


def usable(x: Tensor) -> bool:
    """Whether `x` is what the kernels work on."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and available()


@functools.cache
def kernel(name: str, *shape: int | float) -> Kernel:
    """The kernel of that name in the modules of kernels. Raises RuntimeError where there are none."""
    modules = cpu_kernels, cpu_linear, cpu_attention, cpu_draw, cpu_verdict
    make = next(make for module in modules if (make := getattr(module, f"{name}_kernel", None)))
    return compiler().compile(make(compiler().machine, *shape).finished())


LARGE_PAGE = 2 << 20


def in_large_pages(size: int) -> Tensor:
    """`size` bytes, not yet written, that Linux is asked to back with pages of 2 MiB; elsewhere ordinary ones."""
    piece = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    piece = piece[-piece.data_ptr() % LARGE_PAGE :][:size]
    if platform.system() == "Linux" and size >= LARGE_PAGE:
        use_large = 14
        length = ctypes.c_size_t(size - size % LARGE_PAGE)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(piece.data_ptr()), length, use_large)
    return piece


class _WeightMemory:
    """Pieces of memory in large pages, filled one weight after the other; freed with the last weight of a piece."""

    PIECE = 64 << 20

    def __init__(self):
        self._free = torch.empty(0, dtype=torch.uint8)

    def place(self, weight: Tensor) -> Tensor:
        """A copy of the weight, contiguous; a token's time, which goes into reading weights, is 5 % shorter for it."""
        size = weight.nbytes + -weight.nbytes % 64
        if size > len(self._free):
            self._free = in_large_pages(max(size, self.PIECE))
        placed, self._free = self._free[: weight.nbytes], self._free[size:]
        return placed.view(weight.dtype).view(weight.shape).copy_(weight)


_weight_memory = _WeightMemory()


class CompiledLinear:
    """Bias-free linear map: x [N, K] fp32 -> [N, M] fp32, weights in bf16 or fp32.

    With bf16 weights on a CPU with AVX512-BF16, x is rounded to bf16 too where K is a multiple of 16; where it is one
    of 32 and the CPU has AMX, rows are multiplied sixteen at a time.
    """

    def __init__(self, weight: Tensor, reuses_memory: bool = False):
        """weight [M, K] in the dtype to keep it in; reuses_memory: a result is overwritten by the next one.

        Raises RuntimeError where kernels are not available.
        """
        self.outputs, self.inputs = weight.shape
        machine, in_bf16 = compiler().machine, weight.dtype is torch.bfloat16
        self.rounds_inputs = in_bf16 and machine.bf16_dots and self.inputs % machine.lanes == 0
        self.tiled = self.rounds_inputs and machine.bf16_tiles and self.inputs % TILE_INPUTS == 0
        if self.tiled:
            self.kernel = kernel("tiled_linear")
        else:
            self.kernel = kernel("linear", "dots" if self.rounds_inputs else "widened" if in_bf16 else "fp32")
        tile = VECTORS * machine.lanes
        padded = F.pad(weight, (0, 0, 0, -self.outputs % tile))
        self._tiles, self._padded = len(padded) // tile, len(padded)
        self.dense = self._padded == self.outputs  # no padding between the rows of y
        # A tile's weights are read as one stream, words that hold two bf16 numbers where they are bf16: [M / tile,
        # K / 2, tile, 2] where pairs of inputs are multiplied, [M / tile, K, tile / 2, 2] where they are widened.
        tiles = padded.view(self._tiles, tile, self.inputs)
        if self.rounds_inputs:
            tiles = tiles.unflatten(2, (-1, 2)).transpose(1, 2)
        elif in_bf16:
            tiles = tiles.unflatten(1, (2, -1)).permute(0, 3, 2, 1)
        else:
            tiles = tiles.transpose(1, 2)
        self.weight = _weight_memory.place(tiles)
        self.reuses_memory, self._memory = reuses_memory, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows = len(x)
        shape = self._computed(rows), self._padded
        if self.reuses_memory:  # in large pages: to fill fresh ones costs more than most products do
            if math.prod(shape) > len(self._memory):
                self._memory = in_large_pages(4 * math.prod(shape)).view(torch.float32)
            y = self._memory[: math.prod(shape)].view(shape)
        else:
            y = x.new_empty(shape)
        scratch = x.new_empty(torch.get_num_threads() * len(y) * self.inputs // 2 if self.rounds_inputs else 0)
        self.kernel(rows * self._padded * self.inputs, *self.fields(x, y, scratch, rows))
        y = y[:rows]
        return y if self.dense else y[:, : self.outputs].contiguous()

    def fields(self, x: Tensor, y: Tensor, scratch: Tensor, rows: int) -> list[Field]:
        """Of `kernel`. y has room for `rows` rounded up to 16, scratch for as many rows of K bf16 a thread."""
        if self.tiled:
            config = _tile_config(min(max(rows, 1), TILE_ROWS))
            return [x, self.weight, y, scratch, config, rows, self._computed(rows), self.inputs, self._tiles]
        return [x, self.weight, y, scratch, rows, self.inputs, self._tiles]

    def _computed(self, rows: int) -> int:
        return rows + -rows % TILE_ROWS if self.tiled and rows > TILE_ROWS else rows


def is_dense(linear_map: object) -> TypeGuard[CompiledLinear]:
    """Whether programs can have it: compiled, no padding between the rows of its result."""
    return isinstance(linear_map, CompiledLinear) and linear_map.dense


@functools.cache
def _tile_config(rows: int) -> Tensor:
    return torch.frombuffer(bytearray(tile_config(rows)), dtype=torch.uint8)


def first_maximum(x: Tensor) -> Tensor:
    """Index [N] of the first maximum of each row of x [N, M] contiguous."""
    rows, width = x.shape
    indices = x.new_empty(rows, dtype=torch.int64)
    kernel("first_maximum", width)(x.numel(), x, indices, rows)
    return indices


def truncated_probs(x: Tensor, settings: NDArray[np.float32]) -> Tensor:
    """`sampling.truncated_probs` in place: x [N, V] contiguous; temperature, top-k, top-p and min-p [N, 4]."""
    rows, width = x.shape
    greedy = torch.from_numpy(np.flatnonzero(settings[:, 0] == 0))
    best = first_maximum(x.index_select(0, greedy)) if len(greedy) else None
    top_k = settings[:, 1]
    own = settings.copy()
    own[:, 0] = np.where(settings[:, 0] == 0, 1, settings[:, 0])
    own[:, 1] = np.where((top_k > 0) & (top_k < width), top_k, width)
    scratch = torch.empty(torch.get_num_threads() * (width + 16))
    run = kernel("truncated_probs", width, least_exponent(x.dtype))
    run(x.numel() * 16, x, torch.from_numpy(own), scratch, rows)
    if best is not None:
        x.index_fill_(0, greedy, 0.0)[greedy, best] = 1.0
    return x


def verify(
    target_probs: Tensor, draft: Draft, verify_lengths: Tensor, accept_uniforms: ArrayLike, target_uniforms: ArrayLike
) -> tuple[Tensor, Tensor]:
    """`spec.verify.verify`: accepted and next tokens [R]. target_probs [B, V] contiguous are written over."""
    requests, slots = draft.tokens.shape
    assert len(target_probs) == requests + int(verify_lengths.sum()), "1 + verify length rows for each request"
    assert (verify_lengths <= draft.lengths).all(), "a slot without a draft token cannot be verified"
    draws = np.zeros((2, requests, slots + 1))
    draws[0, :, 1:], draws[1] = accept_uniforms, target_uniforms
    accept, own = torch.from_numpy(draws[0]), torch.from_numpy(draws[1])
    accepted, next_token = torch.empty(2, requests, dtype=torch.int64)
    drafted = (t.contiguous() for t in (verify_lengths, draft.tokens, draft.support, draft.draft_probs.float()))
    run = kernel("verify", target_probs.shape[1], draft.support.shape[2])
    run(
        requests * target_probs.shape[1] * 4, target_probs, *drafted, accept, own, accepted, next_token, slots, requests
    )
    return accepted, next_token
