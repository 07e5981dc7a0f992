"""The engine: one `step()` serves every running request, decoding ones and prompts together."""

import itertools
import random
import time
from dataclasses import dataclass, field

import torch

from dspark.drafters.interface import Drafter
from dspark.engine.kv_cache import KVCache, slot_bytes
from dspark.engine.runner import Outcome, Runner
from dspark.engine.scheduler import Scheduler, StepPlan
from dspark.engine.sequence import Sequence
from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft
from dspark.spec.prefix_scheduler import FixedLength, PrefixScheduler


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits; none is ever exceeded.

    kv_gib bounds the KV cache of target and drafter together; prefill_tokens the prompt tokens of a step.
    """

    max_streams: int = 64
    max_model_len: int = 4096
    kv_gib: float = 2.0
    prefill_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_model_len", "kv_gib", "prefill_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class StepTimes:
    """Seconds since the start, by part of a step; `other` is scheduling and bookkeeping."""

    draft: float = 0.0
    target: float = 0.0
    other: float = 0.0
    rounds: int = 0  # steps in which at least one sequence decoded

    @property
    def total(self) -> float:
        return self.draft + self.target + self.other


@dataclass
class NewTokens:
    """Tokens that a step committed to a sequence."""

    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)


class Engine:
    """Requests in (`add`), tokens out (`step`); any number at once, joining and leaving between steps."""

    def __init__(
        self,
        target: Decoder,
        drafter: Drafter | None = None,
        prefix_scheduler: PrefixScheduler | None = None,
        eos_ids: frozenset[int] = frozenset(),
        config: EngineConfig = EngineConfig(),
    ):
        """prefix_scheduler: by default every draft token is verified."""
        self.target, self.drafter, self.config, self.eos_ids = target, drafter, config, eos_ids
        self.block_size = drafter.block_size if drafter is not None else 0
        self.prefix_scheduler = prefix_scheduler or FixedLength(self.block_size)
        self.max_model_len = min(config.max_model_len, target.config.max_position_embeddings - self.block_size)
        per_slot = slot_bytes(target.config, target.compute_dtype) + (drafter.slot_bytes if drafter is not None else 0)
        num_slots = min(
            int(config.kv_gib * 2**30) // per_slot,
            config.max_streams * (self.max_model_len + self.block_size),
        )
        if num_slots <= self.block_size + 1:
            raise ValueError(f"kv_gib={config.kv_gib} does not hold a single token; {per_slot} bytes are one slot")
        self.kv_bytes = num_slots * per_slot
        self.cache = KVCache(target.config, num_slots, target.compute_dtype, target.device)
        if drafter is not None:
            drafter.allocate(num_slots)
        self.scheduler = Scheduler(self.cache, config.max_streams, config.prefill_tokens, self.block_size)
        self.runner = Runner(target, self.cache, drafter)
        self.times = StepTimes()
        self._ids = itertools.count()

    @property
    def longest_request(self) -> int:
        """Tokens, prompt and answer together, that one request may take."""
        return min(self.max_model_len, self.cache.num_slots - self.block_size)

    def limits(self) -> str:
        """One line for humans: what this engine will never exceed."""
        return (
            f"limits: {self.config.max_streams} streams, {self.longest_request} tokens a request, "
            f"{self.cache.num_slots} KV slots ({self.kv_bytes / 2**30:.2f} GiB)"
        )

    def add(self, prompt_ids: list[int], params: SamplingParams) -> Sequence:
        """Queue a request. Raises ValueError for an empty prompt or one that can never fit."""
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        if not all(0 <= i < self.target.config.vocab_size for i in prompt_ids):
            raise ValueError(f"the prompt holds token ids outside 0..{self.target.config.vocab_size - 1}")
        if len(prompt_ids) + params.max_new_tokens > self.longest_request:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and {params.max_new_tokens} new ones do not fit the limit of "
                f"{self.longest_request} tokens; shorten the prompt or ask for fewer new tokens"
            )
        seed = params.seed if params.seed is not None else random.SystemRandom().getrandbits(62)
        sequence = Sequence(next(self._ids), list(prompt_ids), params, seed)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request between steps; its tokens so far stay readable. Does nothing once it has finished."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.release(sequence)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[NewTokens]:
        """Schedule, draft, choose, verify, commit."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        draft = self.draft(plan)
        drafted = time.perf_counter()
        verify_lengths = self.choose(plan, draft)
        chosen = time.perf_counter()
        outcome, output = self.runner.verify(plan, draft, verify_lengths)
        verified = time.perf_counter()
        new_tokens, accepted = self.commit(outcome)
        committed = time.perf_counter()
        self.runner.extend_drafter(outcome.batch, output, accepted)
        ended = time.perf_counter()
        self.times.draft += (drafted - planned) + (ended - committed)
        self.times.target += verified - chosen
        self.times.other += (planned - started) + (chosen - drafted) + (committed - verified)
        self.times.rounds += bool(plan.decoding)
        return new_tokens

    def draft(self, plan: StepPlan) -> Draft | None:
        """Proposals for all decoding sequences; None where nothing decodes or there is no drafter."""
        if self.drafter is None or not plan.decoding:
            return None
        return self.drafter.propose([chunk.sequence for chunk in plan.decoding])

    def choose(self, plan: StepPlan, draft: Draft | None) -> torch.Tensor:
        """Verify lengths [R] of the decoding sequences, none past what the request may still emit."""
        if draft is None:
            return torch.zeros(len(plan.decoding), dtype=torch.int64)
        remaining = [c.sequence.remaining - 1 for c in plan.decoding]  # the target's own token is one of them
        return self.prefix_scheduler.choose(draft).minimum(torch.tensor(remaining))

    def commit(self, outcome: Outcome) -> tuple[list[NewTokens], list[int]]:
        """Append what was decided, truncate the KV of what was rejected, release what has finished.

        Returns the new tokens and, for each sampled span, how many draft tokens were accepted.
        """
        accepted, next_tokens = (t.tolist() for t in outcome.verdict)
        committed: list[NewTokens] = []
        for span in outcome.batch.spans:
            if not span.reaches_anchor:
                self.cache.truncate(span.chunk.sequence.kv, span.position + span.chunk.count)
        for span, kept, next_token in zip(outcome.batch.sampled, accepted, next_tokens, strict=True):
            sequence = span.chunk.sequence
            tokens = [*span.draft_tokens[:kept], next_token]
            self.cache.truncate(span.chunk.sequence.kv, span.position + span.chunk.count + kept)
            stop_ids = frozenset(sequence.params.stop_token_ids)
            if not sequence.params.ignore_eos:
                stop_ids |= self.eos_ids
            committed.append(NewTokens(sequence, sequence.append(tokens, stop_ids)))
            if span.decoding:
                sequence.rounds += 1
                sequence.accepted_tokens += len(committed[-1].token_ids) - 1
            if sequence.finish_reason is not None:
                self.scheduler.release(sequence)
        return committed, accepted
