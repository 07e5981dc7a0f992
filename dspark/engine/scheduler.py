"""Admits requests, gives them memory and picks what each step works on. Handles no tensors."""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from dspark.engine.kv_cache import KVCache
from dspark.engine.sequence import Sequence
from dspark.spec.walk import Load


@dataclass
class Chunk:
    """The next `count` pending tokens of a sequence, to be computed in this step, and the draft tokens to be verified
    behind them. All else is as it was when the step was planned."""

    sequence: Sequence
    count: int
    draft_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.region, self.position, self.decoding = self.sequence.kv, self.sequence.num_computed, self.sequence.decoding
        # Whether the target's distribution after the last token comes out of this step.
        self.reaches_anchor = self.count == self.sequence.num_pending

    @property
    def rows(self) -> int:
        return self.count + len(self.draft_tokens)


@dataclass
class StepPlan:
    """decoding: one pending token each, may be drafted for; prefill: chunks of prompts beside them."""

    decoding: list[Chunk]
    prefill: list[Chunk]

    @cached_property
    def load(self) -> Load:
        """What prefix schedulers are told of the step."""
        ids = tuple(chunk.sequence.request_id for chunk in self.decoding)
        return Load(ids, sum(chunk.count for chunk in self.prefill))

    @property
    def chunks(self) -> list[Chunk]:
        return self.decoding + self.prefill


@dataclass
class Counters:
    """What happened to requests and their memory since the start."""

    growths: int = 0  # of a running request's region, where it lay
    moves: int = 0  # growths that had to copy the region elsewhere
    preemptions: int = 0
    reused_tokens: int = 0  # whose KV was copied at admission
    computed_prompt_tokens: int = 0  # planned in prefill chunks; those of preempted requests count again


class Scheduler:
    """First come, first served, with memory for what is there and `growth` tokens more.

    `running` and `waiting` are both in order of arrival, and whatever runs came before whatever waits: only the
    head of the queue is admitted, only the youngest running request is preempted, and it returns to the head.

    Every request ends. A step preempts only for the growth of a request older than the victim, or the victim's
    own, so nothing takes memory from the oldest request; if it needs more than is free, all others are preempted in
    turn until it has the arena alone, where it fits (`Engine.longest_request`). So it advances in every step, decoding
    or first in line for the prefill budget, and ends; then the next one is the oldest. A preempted request may have
    to compute again what it had, but once for a growth at most, and the growths of all requests are limited.
    """

    def __init__(self, cache: KVCache, max_streams: int, prefill_tokens: int, draft_slots: int, growth: int = 64):
        """prefill_tokens: most prompt tokens a step; draft_slots: KV slots past the end that drafts write to."""
        self.cache, self.max_streams = cache, max_streams
        self.prefill_tokens, self.draft_slots, self.growth = prefill_tokens, draft_slots, growth
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = Counters()

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> StepPlan:
        """Make room, admit what fits, then: all decoding sequences, and prompt chunks up to the token budget."""
        for sequence in list(self.running):
            self.make_room(sequence)
        self.admit()
        decoding = [Chunk(s, 1) for s in self.running if s.decoding]
        prefill: list[Chunk] = []
        budget = self.prefill_tokens
        for sequence in self.running:
            if not sequence.decoding and budget > 0:
                count = min(sequence.num_prefill, budget)
                prefill.append(Chunk(sequence, count))
                budget -= count
        self.counters.computed_prompt_tokens += self.prefill_tokens - budget
        return StepPlan(decoding, prefill)

    def make_room(self, sequence: Sequence) -> None:
        """Let a running sequence's region hold what this step may write, at the cost of younger ones or of itself."""
        needed = len(sequence.token_ids) + self.draft_slots
        while (region := sequence.region) is not None and region.capacity < needed:
            start = region.start
            if not self.cache.grow(region, self.capacity(sequence)):
                self.preempt()
            elif region.start == start:
                self.counters.growths += 1
            else:
                self.counters.moves += 1

    def preempt(self) -> None:
        """Send the youngest running sequence back to the head of the queue, with its tokens, without its memory."""
        sequence = self.running.pop()
        self.cache.release(sequence.kv)
        sequence.region = None
        self.waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.max_streams:
            sequence = self.waiting[0]
            region = self.cache.reserve(sequence.token_ids, self.capacity(sequence), self.limit(sequence))
            if region is None:
                break
            sequence.region = region
            self.running.append(self.waiting.popleft())
            self.counters.reused_tokens += region.length

    def capacity(self, sequence: Sequence) -> int:
        """KV slots to reserve now."""
        return min(len(sequence.token_ids) + self.draft_slots + self.growth, self.limit(sequence))

    def limit(self, sequence: Sequence) -> int:
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

    def check_integrity(self) -> None:
        """Limits and the order of arrival hold; exactly the running sequences own memory."""
        self.cache.check_integrity()
        ids = [s.request_id for s in [*self.running, *self.waiting]]
        assert ids == sorted(set(ids)), "a younger request runs before an older one"
        assert len(self.running) <= self.max_streams
        assert all(s.region is None and s.finish_reason is None for s in self.waiting)
        assert self.cache.used_slots == sum(s.kv.capacity for s in self.running)
        for sequence in self.running:
            assert sequence.finish_reason is None and sequence.kv.token_ids is sequence.token_ids
            assert sequence.num_computed < len(sequence.token_ids)
