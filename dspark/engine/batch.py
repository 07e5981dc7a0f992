"""From a step's plan to flat tensors, and the attention that knows where each request begins.

Shapes: B batch tokens, H query heads, K KV heads, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import Chunk, StepPlan
from dspark.models.layers import attend, causal_mask


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

    def logit_rows(self) -> Tensor:
        ends = [(s.first_row + s.count, s.verify_length + 1) for s in self.sampled]
        rows = [row for end, wanted in ends for row in range(end - wanted, end)]
        return torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)


def build_batch(plan: StepPlan, draft_tokens: list[list[int]], device: torch.device) -> Batch:
    """Flatten a plan; draft_tokens[i] are the tokens to verify of plan.decoding[i]."""
    spans, tokens, positions, slots = [], [], [], []
    rows = [(chunk, True, draft) for chunk, draft in zip(plan.decoding, draft_tokens, strict=True)]
    for chunk, decoding, draft in rows + [(chunk, False, []) for chunk in plan.prefill]:
        sequence, position = chunk.sequence, chunk.sequence.num_computed
        row_tokens = sequence.token_ids[position : position + chunk.count] + draft
        spans.append(Span(chunk, decoding, chunk.reaches_anchor, len(tokens), len(row_tokens), position, draft))
        tokens += row_tokens
        row_positions = range(position, position + len(row_tokens))
        positions += row_positions
        slots += [sequence.first_slot + p for p in row_positions]
    return Batch(spans, *torch.tensor([tokens, positions, slots], device=device).unbind())


class RaggedAttention:
    """Writes each step's keys and values to the cache, then attends request by request (see `Attention`).

    A row's result depends on its own request alone.
    """

    def __init__(self, batch: Batch, cache: KVCache, group_size: int):
        self.batch, self.cache = batch, cache
        storage = cache.storage[0]
        self.masks = [
            causal_mask(s.count, s.position + s.count, group_size, storage.dtype, storage.device) for s in batch.spans
        ]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self.cache.storage[layer].index_copy_(0, self.batch.slots, kv)
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for span, mask in zip(self.batch.spans, self.masks, strict=True):
            rows = slice(span.first_row, span.first_row + span.count)
            keys, values = self.cache.view(layer, span.chunk.sequence.first_slot, span.position + span.count)
            out[rows] = attend(q[rows], keys, values, mask)
        return out
