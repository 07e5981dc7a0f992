"""The only place where sequences become tensors and the target runs.

Shapes: B batch tokens, R sequences whose distribution is asked for, L = sum of 1 + l_r logit rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.interface import Drafter
from dspark.engine.batch import Batch, build_batch
from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import StepPlan
from dspark.engine.sequence import Sequence
from dspark.models.decoder import Decoder, DecoderOutput
from dspark.sampling import Purpose, truncated_probs, uniforms
from dspark.spec.draft import Draft
from dspark.spec.verify import Verdict, verify, verify_greedy


@dataclass
class Outcome:
    """What a step decided: for each sampled span, how many draft tokens stay and the target's next token."""

    batch: Batch
    verdict: Verdict


class Runner:
    """Runs target forwards on ragged batches and turns their logits into verdicts."""

    def __init__(self, target: Decoder, cache: KVCache, drafter: Drafter | None):
        self.target, self.cache, self.drafter = target, cache, drafter

    @torch.inference_mode()
    def verify(self, plan: StepPlan, draft: Draft | None, verify_lengths: Tensor) -> tuple[Outcome, DecoderOutput]:
        """One target forward over the plan with the first verify_lengths[i] draft tokens of plan.decoding[i]."""
        lengths = verify_lengths.tolist()
        tokens = [] if draft is None else draft.tokens.tolist()
        draft_tokens = [row[:n] for row, n in zip(tokens, lengths)] if draft else [[] for _ in plan.decoding]
        batch = build_batch(plan, draft_tokens, self.target.device)
        attention = batch.attention(self.cache, self.target.config.group_size)
        taps = self.drafter.tap_layers if self.drafter is not None else ()
        output = self.target.forward(batch.tokens, batch.positions, attention, taps)
        rows = batch.logit_rows()
        if not len(rows):
            empty = torch.empty(0, dtype=torch.int64)
            return Outcome(batch, Verdict(empty, empty)), output
        logits = self.target.logits(output.hidden[rows]).float()
        sequences = [s.chunk.sequence for s in batch.sampled]
        return Outcome(
            batch, self.judge(logits, sequences, self.padded(draft, plan, sequences), verify_lengths)
        ), output

    def judge(self, logits: Tensor, sequences: list[Sequence], draft: Draft, verify_lengths: Tensor) -> Verdict:
        """logits [L, V] of R sequences -> accepted and next tokens, each by its own sampling parameters."""
        lengths = torch.nn.functional.pad(verify_lengths, (0, len(sequences) - len(verify_lengths)))
        if all(s.params.greedy for s in sequences):
            return verify_greedy(logits.argmax(-1), draft.tokens, lengths)
        request = torch.arange(len(sequences)).repeat_interleave(lengths + 1)

        def per_row(values: list[float]) -> Tensor:
            return torch.tensor(values, device=logits.device)[request]

        params = [s.params for s in sequences]
        target_probs = truncated_probs(
            logits,
            per_row([p.temperature for p in params]),
            per_row([p.top_k for p in params]),
            per_row([p.top_p for p in params]),
            per_row([p.min_p for p in params]),
        )
        g = draft.tokens.shape[1]
        seeds = [[s.seed] for s in sequences]
        positions = np.array([[len(s.token_ids)] for s in sequences]) + np.arange(g + 1)  # [R, G+1]
        accept = torch.from_numpy(uniforms(seeds, positions[:, :g], Purpose.ACCEPT))
        bonus = torch.from_numpy(uniforms(seeds, positions, Purpose.TARGET))
        return verify(target_probs, draft, lengths, accept.to(logits.device), bonus.to(logits.device))

    def padded(self, draft: Draft | None, plan: StepPlan, sequences: list[Sequence]) -> Draft:
        """The draft extended by empty rows for prompts that end in this step."""
        if draft is None:
            shape = (len(sequences), 0)
            tokens = torch.empty(shape, dtype=torch.int64)
            return Draft.unsampled(tokens, torch.empty(shape), torch.zeros(len(sequences), dtype=torch.int64))
        more = len(sequences) - len(plan.decoding)
        if not more:
            return draft

        def grow(t: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(more, *t.shape[1:])])

        return Draft(
            grow(draft.tokens),
            grow(draft.support),
            grow(draft.draft_probs),
            grow(draft.confidence_logits),
            grow(draft.lengths),
        )

    @torch.inference_mode()
    def extend_drafter(self, batch: Batch, output: DecoderOutput, accepted: list[int]) -> None:
        """Give the drafter the taps of this step's committed tokens; accepted[i] belongs to batch.sampled[i]."""
        if self.drafter is None or not self.drafter.tap_layers:
            return
        kept = iter(accepted)
        rows: list[int] = []
        for span in batch.spans:
            rejected = span.verify_length - next(kept) if span.reaches_anchor else 0
            rows += range(span.first_row, span.first_row + span.count - rejected)
        index = torch.tensor(rows, device=batch.tokens.device)
        self.drafter.extend([t[index] for t in output.taps], batch.positions[index], batch.slots[index])
