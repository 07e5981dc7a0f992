"""From a step's plan to flat tensors.

Shapes: B batch tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.kv_cache import KVCache, Region
from dspark.engine.scheduler import Chunk, StepPlan
from dspark.models.attention import CachedAttention, Segment


@dataclass
class Span:
    """Rows first_row .. first_row+count of the batch are one request's tokens at position .. position+count."""

    chunk: Chunk
    decoding: bool
    reaches_anchor: bool
    first_row: int
    count: int
    position: int
    draft_tokens: list[int]
    region: Region

    @property
    def verify_length(self) -> int:
        return len(self.draft_tokens)


@dataclass
class Batch:
    """tokens, positions, slots [B] int64: what the target computes on and where its KV goes."""

    spans: list[Span]
    tokens: Tensor
    positions: Tensor
    slots: Tensor

    @property
    def sampled(self) -> list[Span]:
        """Spans whose last 1 + verify_length rows are asked for the target's distribution."""
        return [s for s in self.spans if s.reaches_anchor]

    def attention(self, cache: KVCache, group_size: int) -> CachedAttention:
        """Each request's rows see its own cached tokens and, causally, each other."""
        segments = [Segment(s.count, s.chunk.sequence.first_slot, s.position + s.count) for s in self.spans]
        return CachedAttention(cache.storage, self.slots, segments, group_size)

    def logit_rows(self) -> list[int]:
        """Those that the target's distribution is asked for, ascending."""
        ends = [(s.first_row + s.count, s.verify_length + 1) for s in self.sampled]
        return [row for end, wanted in ends for row in range(end - wanted, end)]


def build_batch(plan: StepPlan, draft_tokens: list[list[int]], device: torch.device) -> Batch:
    """Flatten a plan; draft_tokens[i] are the tokens to verify of plan.decoding[i]."""
    spans, tokens, positions, slots = [], [], [], []
    planned = [(chunk, True, draft) for chunk, draft in zip(plan.decoding, draft_tokens, strict=True)]
    for chunk, decoding, draft in planned + [(chunk, False, []) for chunk in plan.prefill]:
        sequence, position = chunk.sequence, chunk.sequence.num_computed
        row_tokens = sequence.token_ids[position : position + chunk.count] + draft
        spans.append(
            Span(chunk, decoding, chunk.reaches_anchor, len(tokens), len(row_tokens), position, draft, sequence.kv)
        )
        tokens += row_tokens
        row_positions = range(position, position + len(row_tokens))
        positions += row_positions
        slots += [sequence.first_slot + p for p in row_positions]
    return Batch(spans, *torch.tensor([tokens, positions, slots], device=device).unbind())
