"""The only place where sequences become tensors and the target runs.

Shapes: B batch tokens, R sequences whose distribution is asked for, L = sum of 1 + l_r logit rows, V vocabulary.
"""

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dspark.draws import Purpose, uniforms
from dspark.engine.batch import Batch, build_batch
from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import StepPlan
from dspark.engine.sequence import Sequence
from dspark.models import cpu_ops
from dspark.models.decoder import Decoder, DecoderOutput
from dspark.models.layers import compiled
from dspark.penalties import Prefix, adjusted_logits
from dspark.sampling import TokenLogprobs, categorical, token_logprobs
from dspark.spec.draft import Draft
from dspark.spec.verify import Verdict, verify, verify_greedy


@dataclass
class Outcome:
    """What a step decided: for each sampled span, how many draft tokens stay and the target's next token."""

    batch: Batch
    verdict: Verdict
    logprobs: list[list[TokenLogprobs]]  # by sampled span, of its accepted tokens and the next; empty if not asked for
    sample_seconds: float = 0.0  # time from logits to verdict


class Runner:
    """Runs target forwards on ragged batches and turns their logits into verdicts."""

    def __init__(self, target: Decoder, cache: KVCache, tap_layers: tuple[int, ...] = ()):
        """tap_layers: whose outputs come with each step's."""
        self.target, self.cache, self.tap_layers = target, cache, tap_layers

    @torch.inference_mode()
    def verify(self, plan: StepPlan, draft: Draft | None, verify_lengths: Tensor) -> tuple[Outcome, DecoderOutput]:
        """One target forward over the plan with the first verify_lengths[i] draft tokens of plan.decoding[i]."""
        lengths = verify_lengths.tolist()
        tokens = [] if draft is None else draft.tokens.tolist()
        draft_tokens = [row[:n] for row, n in zip(tokens, lengths)] if draft else [[] for _ in plan.decoding]
        batch = build_batch(plan, draft_tokens, self.target.device)
        attention = batch.attention(self.cache, self.target.config.group_size)
        output = self.target.forward(batch.tokens, batch.positions, attention, self.tap_layers)
        rows = batch.logit_rows()
        if not rows:
            empty = torch.empty(0, dtype=torch.int64)
            return Outcome(batch, Verdict(empty, empty), []), output
        hidden = output.hidden if len(rows) == len(output.hidden) else output.hidden[rows]
        logits = self.target.logits(hidden).float()
        sequences = [s.chunk.sequence for s in batch.sampled]
        if logits.device.type != "cpu":
            torch.accelerator.synchronize(logits.device)  # the verdict waits for the forward: that is not its time
        started = time.perf_counter()
        adjusted = adjusted_logits(logits, row_prefixes(batch))
        verdict = self.judge(adjusted, sequences, self.padded(draft, plan, sequences), verify_lengths)
        logprobs = committed_logprobs(logits, batch, verdict)
        return Outcome(batch, verdict, logprobs, time.perf_counter() - started), output

    def judge(self, logits: Tensor, sequences: list[Sequence], draft: Draft, verify_lengths: Tensor) -> Verdict:
        """Adjusted logits [L, V] of R sequences -> accepted and next tokens, each by its own sampling parameters.

        The token of a coupled sequence is drawn at each position as plain decoding draws it, and verified like a
        greedy one. So its text depends on its seed alone: not on the drafter, the verify lengths or the company. Other
        sequences accept more, by block verification, but which draw gives a token depends on what was verified.
        """
        lengths = verify_lengths
        if len(sequences) > len(lengths):  # prompts that end in this step
            lengths = torch.nn.functional.pad(lengths, (0, len(sequences) - len(lengths)))
        if all(s.params.greedy for s in sequences):
            return verify_greedy(self.target.likeliest(logits), draft.tokens, lengths)
        params, counts = [s.params for s in sequences], lengths.cpu().numpy() + 1
        settings = np.array([(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]).repeat(counts, 0)  # [L, 4]
        if any(p.logprobs is not None for p in params):
            logits = logits.clone()
        target_probs = self.target.truncated_probs(logits, settings)
        slots = np.arange(draft.tokens.shape[1] + 1)
        seeds, anchors = np.array([(s.seed, len(s.token_ids)) for s in sequences]).T[..., None]  # [R, 1] each
        purposes = np.array([Purpose.TARGET, Purpose.ACCEPT])[:, None, None]
        own, accept = uniforms(seeds, anchors + slots, purposes, [0 * slots[None], slots[None]])  # [R, G+1] each
        coupled = np.array([s.coupled for s in sequences])
        if coupled.any():
            row = coupled.repeat(counts).nonzero()[0]
            slot = np.concatenate([slots[:count] for count in counts])[row]
            index = torch.from_numpy(row).to(logits.device)
            drawn = categorical(target_probs.index_select(0, index), own.repeat(counts, 0)[row, slot])
            target_probs.index_fill_(0, index, 0.0)[index, drawn] = 1.0
        decide = cpu_ops.verify if compiled(target_probs) else verify
        return Verdict(*decide(target_probs, draft, lengths, accept[:, :-1], own))

    def padded(self, draft: Draft | None, plan: StepPlan, sequences: list[Sequence]) -> Draft:
        """The draft extended by empty rows for prompts that end in this step."""
        if draft is None:
            tokens = torch.empty(len(sequences), 0, dtype=torch.int64)
            lengths = torch.zeros(len(sequences), dtype=torch.int64)
            return Draft.unsampled(tokens, lengths, torch.empty(*tokens.shape, 1))
        return draft.placed(list(range(len(draft.lengths))), len(sequences))


def row_prefixes(batch: Batch) -> list[Prefix]:
    """What each logit row [L] comes after: the request's tokens, then the draft tokens before the row."""
    sequences = [span.chunk.sequence for span in batch.sampled]
    if not any(s.params.adjusts_logits for s in sequences):
        return []
    return [
        Prefix(s.params, s.token_ids, s.prompt_length, s.end_ids, span.draft_tokens[:slot])
        for s, span in zip(sequences, batch.sampled)
        for slot in range(span.verify_length + 1)
    ]


def committed_logprobs(logits: Tensor, batch: Batch, verdict: Verdict) -> list[list[TokenLogprobs]]:
    """By sampled span: log-probabilities, in the target's own logits [L, V], of the tokens that the verdict commits."""
    rows, tokens, tops, counts = [], [], [], []
    first_row = 0
    for span, accepted, next_token in zip(batch.sampled, verdict.accepted.tolist(), verdict.next_token.tolist()):
        top = span.chunk.sequence.params.logprobs
        counts.append(0 if top is None else accepted + 1)
        if top is not None:
            rows += range(first_row, first_row + accepted + 1)
            tokens += [*span.draft_tokens[:accepted], next_token]
            tops += [top] * (accepted + 1)
        first_row += span.verify_length + 1
    if not rows:
        return [[] for _ in counts]
    index = torch.tensor([rows, tokens], device=logits.device)
    found = iter(token_logprobs(logits[index[0]], index[1], tops))
    return [list(islice(found, count)) for count in counts]
