"""Building blocks that target and drafter share: linear maps, norm, rotary embedding, attention.

Shapes: N tokens (all requests flattened), H query heads, K KV heads, D head width, T cached positions.
"""

import functools
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.models import bf16_linear

PACK_ROWS = 8  # oneDNN picks a weight layout for about this many rows; measured best from 2 to 64 rows


def storage_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of precision `dtype` is held and computed on `device`.

    A CPU without bf16 matrix instructions runs bf16 products 50 times slower than fp32 ones, so there
    a bf16 model keeps its bf16-rounded weights but computes in fp32.
    """
    if dtype is torch.bfloat16 and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
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


def linear_map(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The fastest bias-free map [N, in] -> [N, out] for weight [out, in] of a model of precision `dtype`.

    fp32 is the precision to compare in, so it keeps `F.linear`: the other two add in another order, which moves
    logits of 40 by up to 1.7e-4.
    """
    if dtype is torch.bfloat16 and weight.device.type == "cpu":
        if weight.dtype is torch.float32 and bf16_linear.available():
            return bf16_linear.Bf16Linear(weight)
        on_x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
        if on_x86 and (weight.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return PackedLinear(weight)
    return functools.partial(F.linear, weight=weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, D] fp32 in the half-rotated layout of Llama; sin carries the sign of the rotation.

    The angles are rounded to fp32 as Transformers rounds them: at position 1000 that alone moves logits by 1e-4.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., N, heads, D] by cos, sin [..., N, 1, D]; the product is taken in their fp32."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype)


def fold_groups(q: Tensor, num_kv_heads: int) -> Tensor:
    """q [N, H, D] -> [K, G*N, D]: the queries that share a KV head become rows of one product."""
    n, h, d = q.shape
    return q.view(n, num_kv_heads, h // num_kv_heads, d).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, d)


def unfold_groups(out: Tensor, n: int) -> Tensor:
    """[K, G*N, D] -> [N, H*D], the inverse of `fold_groups`."""
    k, rows, d = out.shape
    return out.view(k, rows // n, n, d).permute(2, 0, 1, 3).reshape(n, -1)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one request: q [N, H, D] over keys, values [T, K, D] -> [N, H*D].

    mask [G*N, T] is added to the scores (rows ordered as `fold_groups` does); None sees everything.
    """
    folded = fold_groups(q, keys.shape[1])
    out = F.scaled_dot_product_attention(
        folded[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask
    )[0]
    return unfold_groups(out, q.shape[0])


def causal_mask(n: int, length: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Mask [G*n, length] for the last n of `length` positions; None where one row sees everything."""
    if n == 1:
        return None
    blocked = torch.full((n, length), float("-inf"), dtype=dtype, device=device).triu_(length - n + 1)
    return blocked.repeat(group_size, 1)
