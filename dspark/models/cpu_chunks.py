"""Which rows of a batch attend to what, cut into chunks, and the compiled attention over them (`cpu_attention.py`).

Shapes: N rows, H query heads, KV key-value heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspark.models import cpu_attention, cpu_ops
from dspark.models.cpu_attention import CHUNK_ROWS
from dspark.models.cpu_linear import TILE_INPUTS, TILE_ROWS
from dspark.models.cpu_ops import Kernel

LANES = 16  # of the widest vector


class AttentionShape(NamedTuple):
    """Heads that attention is over: `group` queries share a KV head."""

    kv_heads: int
    group: int
    head_dim: int
    in_bf16: bool

    @property
    def tiled(self) -> bool:
        """Whether AMX tiles do it, for which queries and the softmax's numerators are rounded to bf16."""
        has_tiles = cpu_ops.compiler().machine.bf16_tiles
        return has_tiles and self.in_bf16 and self.head_dim in (64, 128) and self.group <= TILE_ROWS

    @property
    def in_pairs(self) -> bool:
        """Whether dot products of bf16 pairs do it, rounded as for tiles."""
        has_dots = cpu_ops.compiler().machine.bf16_dots and not self.tiled
        return has_dots and self.in_bf16 and self.head_dim % TILE_INPUTS == 0

    @property
    def kernel(self) -> Kernel:
        shape = self.kv_heads, self.group, self.head_dim
        if self.tiled:
            return cpu_ops.kernel("tiled_attention", *shape)
        return cpu_ops.kernel("attention", *shape, self.in_bf16, self.in_pairs)

    def chunk_rows(self, requests: int) -> int:
        """Rows of a chunk at most; for few requests fewer, so that all threads have work."""
        if self.tiled:
            return TILE_ROWS // self.group
        return CHUNK_ROWS if requests >= torch.get_num_threads() else CHUNK_ROWS // 2

    def scratch(self, longest: int) -> tuple[int, int]:
        """For rows that see up to `longest` slots: floats for a row's scores, and floats a thread."""
        if self.tiled:
            span = longest + TILE_INPUTS  # whole tiles are written
            return span, cpu_attention.tiled_scratch(self.head_dim) + TILE_ROWS * span
        span = longest + LANES  # whole vectors are written
        return span, self.head_dim * LANES + CHUNK_ROWS * self.group * (self.head_dim + span)


@dataclass
class Chunks:
    """Rows of a batch and what they attend to: chunks [n, 5] int64, each a few consecutive rows of one request.

    A chunk: first row, number of rows, first slot, slots that the last row sees, how many fewer each row before it
    sees (1: causal, or 0).
    """

    shape: AttentionShape
    chunks: Tensor
    longest: int  # slots that any row sees

    @property
    def items(self) -> int:
        """Of the kernel."""
        return len(self.chunks) * self.shape.kv_heads

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int, bool]], shape: AttentionShape) -> "Chunks":
        """segments: rows, first slot, slots the last row sees, whether causal; rows lie one segment after the other."""
        most = shape.chunk_rows(len(segments))
        chunks, row = [], 0
        for count, first_slot, length, causal in segments:
            pieces = -(-count // most)
            for i in range(pieces):
                start, end = count * i // pieces, count * (i + 1) // pieces
                chunks.append((row + start, end - start, first_slot, length - causal * (count - end), int(causal)))
            row += count
        longest = max((s[2] for s in segments), default=0)
        return cls(shape, torch.tensor(chunks, dtype=torch.int64).view(-1, 5), longest)


def attend_chunks(q: Tensor, kv: Tensor, rows: Chunks) -> Tensor:
    """q [N, H, D] fp32 (heads contiguous) over kv [slots, 2, KV, D], fp32 or bf16 -> [N, H*D]."""
    count, heads, head_dim = q.shape
    span, room = rows.shape.scratch(rows.longest)
    out = q.new_empty(count, heads * head_dim)
    scratch = q.new_empty(torch.get_num_threads() * room)
    fields = q, kv, out, scratch, rows.chunks, q.stride(0), room, span, rows.items
    rows.shape.kernel(out.numel() * rows.longest, *fields)
    return out
