"""Building blocks that target and drafter share: linear maps, norm, rotary embedding, attention.

Shapes: N tokens (all requests flattened), H query heads, K KV heads, D head width, T cached positions.
"""

import functools
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.models import cpu_ops

PACK_ROWS = 8  # oneDNN picks a weight layout for about this many rows; measured best from 2 to 64 rows


def has_bf16_products(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices fast; a CPU without such instructions runs them 50 times slower."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def storage_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of precision `dtype` keeps its activations on `device`.

    On a CPU a bf16 model keeps bf16 weights and fp32 activations: the compiled operations decode 1.5 times faster
    than oneDNN in bf16, a row's result does not depend on its batch, and exact ties between logits are rare. Only
    a CPU that has bf16 instructions but cannot run the compiled operations keeps bf16 activations.
    """
    if dtype is torch.bfloat16 and device.type == "cpu" and (cpu_ops.available() or not has_bf16_products(device)):
        return torch.float32
    return dtype


class PackedLinear:
    """Bias-free linear map, [N, in] -> [N, out], with a weight laid out for oneDNN.

    Reading such a weight runs at about twice the bandwidth of `F.linear` for 1 to 8 rows.
    """

    def __init__(self, weight: Tensor):
        """weight [out, in]; kept only in the packed form."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def linear_map(
    weight: Tensor, dtype: torch.dtype, deterministic: bool = False, reuses_memory: bool = False
) -> Callable[[Tensor], Tensor]:
    """The fastest bias-free map [N, in] -> [N, out] for weight [out, in] of a model of precision `dtype`.

    fp32 is the precision to compare in, so it keeps `F.linear`: the other two add in another order, which moves
    logits of 40 by up to 1.7e-4. Deterministic: a row's result is the same to the last bit in any batch. reuses_memory:
    a result may be overwritten by the next.
    """
    on_cpu, in_fp32 = weight.device.type == "cpu", weight.dtype is torch.float32
    if deterministic or (dtype is torch.bfloat16 and on_cpu and in_fp32 and cpu_ops.available()):
        return cpu_ops.CompiledLinear(weight.to(dtype), reuses_memory)
    if dtype is torch.bfloat16 and on_cpu:
        on_x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
        if on_x86 and (in_fp32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return PackedLinear(weight)
    return functools.partial(F.linear, weight=weight)


def compiled(x: Tensor) -> bool:
    """Whether inference on x runs in the compiled operations: fp32 on a CPU that can have them, no gradients."""
    return torch.is_inference_mode_enabled() and cpu_ops.usable(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if compiled(x) and x.dim() == 2:
        x = x.contiguous()
        y = torch.empty_like(x)
        cpu_ops.kernel("rms_norm", x.shape[1], eps)(x.numel() * 4, x, weight, y, len(x))
        return y
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2*M] -> silu(gate) * up [N, M]."""
    if compiled(gate_up):
        rows, width = len(gate_up), gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, width)
        cpu_ops.kernel("silu_mul", width)(y.numel() * 16, gate_up, y, rows)
        return y
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin [length, 2, D] fp32 in the half-rotated layout of Llama; sin carries the sign of the rotation.

    The angles are rounded to fp32 as Transformers rounds them: at position 1000 that alone moves logits by 1e-4.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., N, heads, D] by cos, sin [..., N, 1, D]; the product is taken in their fp32."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype)


def rotate_(heads: Tensor, count: int, rotary: Tensor, positions: Tensor) -> None:
    """Rotate the first `count` heads of heads [N, >= count, D] in place, positions [N] by their rows of the table."""
    if compiled(heads):
        rows, _, head_dim = heads.shape
        work = rows * count * head_dim * 4
        cpu_ops.kernel("rotary", count, head_dim)(work, heads, rotary, positions, heads.stride(0), rows)
    else:
        cos, sin = rotary[positions].unsqueeze(2).unbind(1)
        heads[:, :count] = apply_rotary(heads[:, :count], cos, sin)
