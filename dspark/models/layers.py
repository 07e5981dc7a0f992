"""Building blocks that target and drafter share: linear maps, norm, rotary embedding, attention.

Shapes: N tokens (all requests flattened), H query heads, K KV heads, D head width, T cached positions.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_ROWS = 8  # oneDNN picks a weight layout for about this many rows; measured best from 2 to 64 rows


def storage_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of precision `dtype` is held and computed on `device`.

    A CPU without bf16 matrix instructions runs bf16 products 50 times slower than fp32 ones, so there
    a bf16 model keeps its bf16-rounded weights but computes in fp32.
    """
    if dtype is torch.bfloat16 and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return dtype


def use_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of precision `dtype` uses oneDNN's packed weights: bf16 on x86 CPUs.

    fp32 is the precision to compare in, so it keeps `F.linear`: the packed products add in another order, which
    moves logits of 40 by up to 1.7e-4.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return dtype is torch.bfloat16 and device.type == "cpu" and on_x86 and torch.backends.mkldnn.is_available()


class Linear:
    """Bias-free linear map for inference, [N, in] -> [N, out].

    Reading a weight packed for oneDNN runs at about twice the bandwidth of `F.linear` for 1 to 8 rows.
    """

    def __init__(self, weight: Tensor, packed: bool):
        """weight [out, in]; kept only in the form that is used."""
        self.packed = packed
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


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
