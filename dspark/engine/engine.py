"""The engine: one `step()` serves every running request, decoding ones and prompts together."""

import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dspark.drafters.interface import Drafter
from dspark.draws import sample_seed
from dspark.engine.answer_text import AnswerText, Decode
from dspark.engine.drafter_context import DrafterContext
from dspark.engine.kv_cache import KVCache, slot_bytes
from dspark.engine.runner import Outcome, Runner
from dspark.engine.scheduler import Scheduler, StepPlan
from dspark.engine.sequence import Sequence
from dspark.engine.times import StepClock, StepTimes
from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams
from dspark.spec.calibration import Calibration, Calibrator
from dspark.spec.draft import Draft
from dspark.spec.live_costs import StepTaken
from dspark.spec.prefix_scheduler import FixedLength, PrefixScheduler

WAITING_PARTS = 8  # of the memory, one for what waits for the drafter: of 2 GiB, 220 tokens of 64 requests twice over


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits; none is ever exceeded.

    kv_gib bounds what is kept of requests: KV cache of target and drafter and, an eighth of it at most, what waits for
    the drafter (`DrafterContext`); prefill_tokens the prompt tokens of a step.
    reuse_prefixes: copy the KV of leading tokens that another request computed instead of computing it again.
    seed: of requests that bring none, with their number; None: another one each time.
    """

    max_streams: int = 64
    max_model_len: int = 4096
    kv_gib: float = 2.0
    prefill_tokens: int = 256
    reuse_prefixes: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_model_len", "kv_gib", "prefill_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class NewTokens(NamedTuple):
    """Tokens that a step committed to a sequence."""

    sequence: Sequence
    token_ids: list[int]


class Engine:
    """Requests in (`add`), tokens out (`step`); any number at once, joining and leaving between steps."""

    def __init__(
        self,
        target: Decoder,
        drafter: Drafter | None = None,
        prefix_scheduler: PrefixScheduler | None = None,
        eos_ids: frozenset[int] = frozenset(),
        config: EngineConfig = EngineConfig(),
        calibration: Calibrator | None = None,
    ):
        """prefix_scheduler: by default every draft token is verified; calibration: by default confidence as it is."""
        self.target, self.drafter, self.config, self.eos_ids = target, drafter, config, eos_ids
        self.block_size = drafter.block_size if drafter is not None else 0
        self.prefix_scheduler = prefix_scheduler or FixedLength(self.block_size)
        self.calibration = calibration or Calibration.identity(self.block_size)
        self.max_model_len = min(config.max_model_len, target.config.max_position_embeddings - self.block_size)
        per_slot = slot_bytes(target.config, target.kv_dtype) + (drafter.slot_bytes if drafter is not None else 0)
        kept = int(config.kv_gib * 2**30)
        self.waiting_bytes = kept // WAITING_PARTS if drafter is not None and drafter.tap_layers else 0
        num_slots = min(
            (kept - self.waiting_bytes) // per_slot,
            config.max_streams * (self.max_model_len + self.block_size),
        )
        if num_slots <= self.block_size + 1:
            raise ValueError(f"kv_gib={config.kv_gib} does not hold a single token; {per_slot} bytes are one slot")
        self.kv_bytes = num_slots * per_slot
        self.context = DrafterContext(drafter, self.waiting_bytes) if drafter is not None else None
        reuse = config.reuse_prefixes
        self.cache = KVCache(target.config, num_slots, target.kv_dtype, target.device, self.context, reuse)
        if drafter is not None:
            drafter.allocate(num_slots)
        self.scheduler = Scheduler(self.cache, config.max_streams, config.prefill_tokens, self.block_size)
        self.runner = Runner(target, self.cache, drafter.tap_layers if drafter is not None else ())
        self.times = StepTimes()
        self.counters = self.scheduler.counters
        self._ids = itertools.count()
        self._seed = config.seed if config.seed is not None else random.SystemRandom().getrandbits(62)

    @property
    def longest_request(self) -> int:
        """Tokens, prompt and answer together, that one request may take."""
        return min(self.max_model_len, self.cache.num_slots - self.block_size)

    def limits(self) -> str:
        """One line for humans: what this engine will never exceed."""
        return (
            f"limits: {self.config.max_streams} streams, {self.longest_request} tokens a request, "
            f"{self.cache.num_slots} KV slots ({self.kv_bytes / 2**30:.2f} GiB)"
            + (f" and {self.waiting_bytes / 2**30:.2f} GiB of what waits for the drafter" if self.waiting_bytes else "")
        )

    def add(self, prompt_ids: list[int], params: SamplingParams, decode: Decode | None = None) -> Sequence:
        """Queue a request; one with stop strings needs `decode`, which makes text of token ids.

        Raises ValueError for an empty prompt, one that can never fit, and parameters impossible for this model.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        if not all(0 <= i < self.target.config.vocab_size for i in prompt_ids):
            raise ValueError(f"the prompt holds token ids outside 0..{self.target.config.vocab_size - 1}")
        if len(prompt_ids) + params.max_new_tokens > self.longest_request:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and {params.max_new_tokens} new ones do not fit the limit of "
                f"{self.longest_request} tokens; shorten the prompt or ask for fewer new tokens"
            )
        request_id = next(self._ids)
        seed = params.seed if params.seed is not None else sample_seed(self._seed, 1 + request_id)
        coupled = params.seed is not None or self.target.deterministic
        end_ids = self.end_ids(params)
        if params.stop and decode is None:
            raise ValueError("stop strings need a tokenizer: pass `decode`, or use LLM")
        text = AnswerText(decode, params.stop) if params.stop and decode is not None else None
        sequence = Sequence(request_id, list(prompt_ids), params, seed, end_ids, text, coupled=coupled)
        self.scheduler.add(sequence)
        return sequence

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a request. Raises ValueError for ids that the model does not have."""
        vocab_size = self.target.config.vocab_size
        for name, ids in (("logit_bias", params.biases), ("stop_token_ids", params.stop_token_ids)):
            if not all(i < vocab_size for i in ids):
                raise ValueError(f"{name} holds token ids outside 0..{vocab_size - 1}")
        ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        if params.min_new_tokens > 0 and len(ids) == vocab_size:
            raise ValueError("min_new_tokens leaves no token: every token of the model is an end token")
        return ids

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request between steps; its tokens so far stay readable. Does nothing once it has finished."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.release(sequence)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[NewTokens]:
        """Schedule, draft, choose, verify, commit; without requests, nothing."""
        if not self.has_work:
            return []
        clock = StepClock()
        plan = self.scheduler.schedule()
        clock.lap("other")
        wanted = self.to_draft(plan)
        clock.lap("choose")
        behind = self.context.behind([plan.decoding[i].sequence for i in wanted]) if self.context is not None else 0
        draft = self.draft(plan, wanted) if wanted else None
        clock.lap("draft")
        if draft is not None:
            self.choose(plan, draft)
        clock.lap("choose")
        outcome = self.runner.verify(plan.chunks, draft, clock)
        if draft is not None:
            verified = torch.tensor([len(chunk.draft_tokens) for chunk in plan.decoding])
            self.calibration.observe(draft.signals, verified, outcome.verdict.accepted[: len(verified)])
        new_tokens, accepted = self.commit(outcome)
        clock.lap("other")
        if self.context is not None:
            self.context.add(outcome.batch, outcome.taps, accepted)
        clock.lap("draft")

        took, requests = clock.times, len(plan.decoding)
        took.rounds = int(requests > 0)
        took.drafted = draft.tokens.shape[1] * len(wanted) if draft is not None else 0
        took.verified = sum(len(chunk.draft_tokens) for chunk in plan.decoding)
        self.times.add(took)
        if plan.decoding and not plan.prefill:
            as_usual = behind <= (1 + self.block_size) * len(wanted)  # more is a backlog, which no profile times
            self.prefix_scheduler.observe(
                StepTaken(
                    requests,
                    requests + took.verified,
                    drafted=len(wanted) * as_usual,
                    slots=0 if draft is None else draft.tokens.shape[1],
                    draft_seconds=took.draft + took.choose,
                    other_seconds=took.target + took.sample + took.other,
                )
            )
        return new_tokens

    def to_draft(self, plan: StepPlan) -> list[int]:
        """Which of the decoding sequences to draft for: none where nothing drafts or it would not pay.

        One that may emit a single token has no use for a draft.
        """
        if self.drafter is None or not plan.decoding:
            return []
        wanted = self.prefix_scheduler.to_draft(plan.load)
        return [i for i in wanted if plan.decoding[i].sequence.remaining > 1]

    def draft(self, plan: StepPlan, wanted: list[int]) -> Draft:
        """Proposals for these of the decoding sequences, empty ones for the others."""
        assert self.context is not None
        slots = min(self.prefix_scheduler.slots_to_draft(plan.load), self.block_size)
        draft = self.context.propose([plan.decoding[i].sequence for i in wanted], slots)
        return draft.placed(wanted, len(plan.decoding))

    def choose(self, plan: StepPlan, draft: Draft) -> None:
        """Give the decoding chunks the draft tokens to verify, none past what the request may still emit."""
        remaining = [c.sequence.remaining - 1 for c in plan.decoding]  # the target's own token is one of them
        lengths = np.minimum(draft.lengths.cpu().numpy(), remaining)
        confidence = self.calibration.confidence(draft.signals)
        verify_lengths = self.prefix_scheduler.choose(confidence, lengths, plan.load)
        for chunk, tokens, count in zip(plan.decoding, draft.tokens.tolist(), verify_lengths.tolist(), strict=True):
            chunk.draft_tokens = tokens[:count]

    def commit(self, outcome: Outcome) -> tuple[list[NewTokens], list[int]]:
        """Append what was decided, truncate the KV of what was rejected, release what has finished.

        Returns the new tokens and, for each sampled chunk, how many draft tokens were accepted.
        """
        accepted, next_tokens = (t.tolist() for t in outcome.verdict)
        committed: list[NewTokens] = []
        for chunk in outcome.batch.chunks:
            if not chunk.reaches_anchor:
                self.cache.truncate(chunk.region, chunk.position + chunk.count)
        decided = zip(outcome.batch.sampled, accepted, next_tokens, outcome.logprobs, strict=True)
        for chunk, kept, next_token, logprobs in decided:
            sequence = chunk.sequence
            tokens = sequence.append([*chunk.draft_tokens[:kept], next_token])
            committed.append(NewTokens(sequence, tokens))
            sequence.logprobs += logprobs[: len(tokens)]
            self.cache.truncate(chunk.region, len(sequence.token_ids) - 1)  # nothing past a stop stays
            if chunk.decoding:
                sequence.rounds += 1
                sequence.accepted_tokens += len(tokens) - 1
            if sequence.finish_reason is not None:
                self.scheduler.release(sequence)
        return committed, accepted
