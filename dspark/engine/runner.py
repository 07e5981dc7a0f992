"""The only place where sequences become tensors and the target runs.

Shapes: B batch tokens, R sequences whose distribution is asked for, L = sum of 1 + l_r logit rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.draws import Purpose, uniforms
from dspark.engine.batch import Batch
from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import Chunk
from dspark.engine.times import StepClock
from dspark.models import cpu_ops
from dspark.models.decoder import Decoder
from dspark.models.layers import compiled
from dspark.penalties import Prefix, adjusted_logits
from dspark.sampling import TokenLogprobs, categorical, token_logprobs
from dspark.spec.draft import Draft
from dspark.spec.verify import Verdict, verify, verify_greedy


@dataclass
class Outcome:
    """What a step decided: for each sampled chunk, how many draft tokens stay and the target's next token."""

    batch: Batch
    taps: list[Tensor]
    verdict: Verdict
    logprobs: list[list[TokenLogprobs]]  # by sampled chunk, of its accepted tokens and the next; empty if not asked for


class Runner:
    """Runs target forwards on ragged batches and turns their logits into verdicts."""

    def __init__(self, target: Decoder, cache: KVCache, tap_layers: tuple[int, ...] = ()):
        """tap_layers: whose outputs come with each step's."""
        self.target, self.cache, self.tap_layers = target, cache, tap_layers

    @torch.inference_mode()
    def verify(self, chunks: list[Chunk], draft: Draft | None, clock: StepClock) -> Outcome:
        """One target forward over all chunks; draft: what their draft tokens are of, a row a decoding chunk."""
        batch = Batch.of(chunks, self.target.device)
        attention = batch.attention(self.cache, self.target.config.group_size)
        output = self.target.forward(batch.tokens, batch.positions, attention, self.tap_layers)
        rows = batch.logit_rows()
        if not rows:
            empty = torch.empty(0, dtype=torch.int64)
            clock.lap("target")
            return Outcome(batch, output.taps, Verdict(empty, empty), [])
        hidden = output.hidden if len(rows) == len(output.hidden) else output.hidden[rows]
        logits = self.target.logits(hidden).float()
        if logits.device.type != "cpu":
            torch.accelerator.synchronize(logits.device)  # the verdict waits for the forward: that is not its time
        clock.lap("target")
        adjusted = adjusted_logits(logits, row_prefixes(batch))
        verdict = self.judge(adjusted, batch.sampled, draft)
        outcome = Outcome(batch, output.taps, verdict, committed_logprobs(logits, batch, verdict))
        clock.lap("sample")
        return outcome

    def judge(self, logits: Tensor, sampled: list[Chunk], draft: Draft | None) -> Verdict:
        """Adjusted logits [L, V] of R chunks -> accepted and next tokens, each by its request's sampling parameters.

        The token of a coupled sequence is drawn at each position as plain decoding draws it, and verified like a
        greedy one. So its text depends on its seed alone: not on the drafter, the verify lengths or the company. Other
        sequences accept more, by block verification, but which draw gives a token depends on what was verified.
        """
        if draft is None:
            draft = Draft.empty(len(sampled))
        draft = draft.placed(list(range(len(draft.lengths))), len(sampled))  # prompts that end in this step come last
        sequences, lengths = [c.sequence for c in sampled], torch.tensor([len(c.draft_tokens) for c in sampled])
        if all(s.params.greedy for s in sequences):
            return verify_greedy(self.target.likeliest(logits), draft.tokens, lengths)
        params, counts = [s.params for s in sequences], lengths.numpy() + 1
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


def row_prefixes(batch: Batch) -> list[Prefix]:
    """What each logit row [L] comes after: the request's tokens, then the draft tokens before the row."""
    sampled = [(chunk, chunk.sequence) for chunk in batch.sampled]
    if not any(s.params.adjusts_logits for _, s in sampled):
        return []
    return [
        Prefix(s.params, s.token_ids, s.prompt_length, s.end_ids, chunk.draft_tokens[:slot])
        for chunk, s in sampled
        for slot in range(len(chunk.draft_tokens) + 1)
    ]


def committed_logprobs(logits: Tensor, batch: Batch, verdict: Verdict) -> list[list[TokenLogprobs]]:
    """By sampled chunk: what the target's own logits [L, V] say of the tokens that the verdict commits."""
    found, row = [], 0
    for chunk, accepted, next_token in zip(batch.sampled, verdict.accepted.tolist(), verdict.next_token.tolist()):
        top, tokens = chunk.sequence.params.logprobs, [*chunk.draft_tokens[:accepted], next_token]
        found.append([] if top is None else token_logprobs(logits[row : row + len(tokens)], tokens, top))
        row += len(chunk.draft_tokens) + 1
    return found
