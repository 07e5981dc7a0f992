"""Attention of many requests over one cache; the only place that knows where a request begins.

Shapes: N rows of the batch, H query heads, K KV heads, G = H / K, D head width, T slots a request sees.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.models import cpu_ops
from dspark.models.config import DecoderConfig
from dspark.models.cpu_chunks import AttentionShape, Chunks, attend_chunks


class Segment(NamedTuple):
    """`rows` consecutive rows of one request, whose last one sees `length` cache slots from `first_slot` on.

    Causal rows see one slot less for every row that follows; otherwise all see the same.
    """

    rows: int
    first_slot: int
    length: int
    causal: bool = True


class CachedAttention:
    """Writes keys and values to the cache, then attends segment by segment (see `Attention` in decoder.py).

    A row's result depends on its own segment alone; compiled, on its own row and cache alone.
    """

    def __init__(self, storage: list[Tensor], slots: Tensor, segments: list[Segment], group_size: int):
        """storage: one tensor [slots, 2, K, D] a layer; slots [N] int64: where each row's keys and values go."""
        self.storage, self.slots, self.segments = storage, slots, segments
        first = storage[0]
        self.chunks = self.masks = None
        if compiled_cache(first):
            shape = AttentionShape(first.shape[2], group_size, first.shape[3], first.dtype is torch.bfloat16)
            self.chunks = Chunks.of(segments, shape)
        else:
            self.masks = [
                causal_mask(s.rows, s.length, group_size, first.dtype, first.device) if s.causal else None
                for s in segments
            ]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        storage = self.storage[layer]
        store(kv, storage, self.slots)
        if self.chunks is not None:
            return attend_chunks(q, storage, self.chunks)
        assert self.masks is not None
        outputs, row = [], 0
        for segment, mask in zip(self.segments, self.masks, strict=True):
            seen = storage[segment.first_slot : segment.first_slot + segment.length]
            outputs.append(attend(q[row : row + segment.rows], seen[:, 0], seen[:, 1], mask))
            row += segment.rows
        return torch.cat(outputs)


def packed_attention(
    lengths: list[int], config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> CachedAttention:
    """Of whole sequences of these lengths, one after the other in a batch, each seeing itself alone."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    # Keys and values of a layer are of no use to the next one: all layers share one cache.
    cache = torch.empty(sum(lengths), 2, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)
    return CachedAttention(
        [cache] * config.num_layers,
        torch.arange(len(cache), device=device),
        [Segment(n, start, n) for n, start in zip(lengths, starts, strict=True)],
        config.group_size,
    )


def compiled_cache(storage: Tensor) -> bool:
    """Whether the compiled operations read and write this cache; rows beside it are then fp32."""
    in_reach = storage.device.type == "cpu" and storage.dtype in (torch.float32, torch.bfloat16)
    return in_reach and torch.is_inference_mode_enabled() and cpu_ops.available()


def store(kv: Tensor, storage: Tensor, slots: Tensor) -> None:
    """Write keys and values [N, 2, K, D] to the slots [N] of storage [slots, 2, K, D]."""
    if compiled_cache(storage) and kv[0].is_contiguous():
        scatter = cpu_ops.kernel("store", storage[0].numel(), storage.dtype is torch.bfloat16)
        scatter(kv.numel() * 8, kv, storage, slots, kv.stride(0), len(slots))
    else:
        storage.index_copy_(0, slots, kv.to(storage.dtype))


def copy_slots(storage: list[Tensor], source: int, target: int, count: int) -> None:
    """Copy `count` slots of every layer from `source` to `target`; the two ranges may overlap."""
    for layer in storage:
        copied = layer[source : source + count]
        layer[target : target + count] = copied.clone() if abs(source - target) < count else copied


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
