"""Admits requests and picks what each step works on. Handles no tensors."""

from collections import deque
from dataclasses import dataclass

from dspark.engine.kv_cache import KVCache
from dspark.engine.sequence import Sequence


@dataclass
class Chunk:
    """The next `count` pending tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int

    @property
    def reaches_anchor(self) -> bool:
        """Whether the target's distribution after the last token comes out of this step."""
        return self.count == self.sequence.num_pending


@dataclass
class StepPlan:
    """decoding: one pending token each, may be drafted for; prefill: chunks of prompts beside them."""

    decoding: list[Chunk]
    prefill: list[Chunk]

    @property
    def chunks(self) -> list[Chunk]:
        return self.decoding + self.prefill


class Scheduler:
    """First come, first served. A request is admitted when a stream and its whole KV region are free."""

    def __init__(self, cache: KVCache, max_streams: int, prefill_tokens: int, draft_slots: int):
        """prefill_tokens: most prompt tokens a step; draft_slots: KV slots past the end that drafts write to."""
        self.cache, self.max_streams = cache, max_streams
        self.prefill_tokens, self.draft_slots = prefill_tokens, draft_slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> StepPlan:
        """Admit what fits, then: all decoding sequences, and prompt chunks up to the token budget."""
        while self.waiting and len(self.running) < self.max_streams:
            region = self.cache.reserve(self.capacity(self.waiting[0]))
            if region is None:
                break
            sequence = self.waiting.popleft()
            sequence.region = region
            self.running.append(sequence)
        decoding = [Chunk(s, 1) for s in self.running if s.decoding]
        prefill: list[Chunk] = []
        budget = self.prefill_tokens
        for sequence in self.running:
            if not sequence.decoding and budget > 0:
                count = min(sequence.num_pending, budget)
                prefill.append(Chunk(sequence, count))
                budget -= count
        return StepPlan(decoding, prefill)

    def capacity(self, sequence: Sequence) -> int:
        """KV slots that the sequence can ever need."""
        return sequence.prompt_length + sequence.params.max_new_tokens + self.draft_slots

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence's stream and memory, finished or not."""
        if sequence.region is not None:
            self.cache.release(sequence.region)
            sequence.region = None
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
