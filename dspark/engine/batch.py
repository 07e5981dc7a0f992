"""From what a step works on to flat tensors.

Shapes: B batch tokens.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import Chunk
from dspark.models.attention import CachedAttention, Segment


@dataclass
class Batch:
    """Chunks in a row. tokens, positions, slots [B] int64: what the target computes on, where its KV goes."""

    chunks: list[Chunk]
    tokens: Tensor
    positions: Tensor
    slots: Tensor

    @classmethod
    def of(cls, chunks: list[Chunk], device: torch.device) -> "Batch":
        """Each chunk's tokens, and behind them its draft tokens."""
        tokens, positions, slots = [], [], []
        for chunk in chunks:
            places = range(chunk.position, chunk.position + chunk.rows)
            tokens += chunk.sequence.token_ids[chunk.position : chunk.position + chunk.count] + chunk.draft_tokens
            positions += places
            slots += [chunk.region.start + place for place in places]
        return cls(chunks, *torch.tensor([tokens, positions, slots], device=device).unbind())

    @property
    def first_rows(self) -> list[int]:
        """Of each chunk."""
        return list(accumulate((c.rows for c in self.chunks[:-1]), initial=0))

    @property
    def sampled(self) -> list[Chunk]:
        """Those that are asked for the target's distribution after their last token and each draft token."""
        return [c for c in self.chunks if c.reaches_anchor]

    def logit_rows(self) -> list[int]:
        """Those that the target's distribution is asked for, ascending."""
        asked = [(first, c) for first, c in zip(self.first_rows, self.chunks) if c.reaches_anchor]
        return [row for first, c in asked for row in range(first + c.count - 1, first + c.rows)]

    def attention(self, cache: KVCache, group_size: int) -> CachedAttention:
        """Each request's rows see its own cached tokens and, causally, each other."""
        segments = [Segment(c.rows, c.region.start, c.position + c.rows) for c in self.chunks]
        return CachedAttention(cache.storage, self.slots, segments, group_size)
