"""What `verify` means: one request at a time, in loops over plain lists, as a paper explains it."""

import torch
from torch import Tensor

from dspark.spec.draft import Draft
from dspark.spec.verify import Verdict


def verify_reference(
    target_probs: Tensor,
    draft: Draft,
    verify_lengths: Tensor,
    accept_uniforms: Tensor,
    target_uniforms: Tensor,
) -> Verdict:
    accepted, next_token = [], []
    rows = iter(target_probs.tolist())
    for r, length in enumerate(verify_lengths.tolist()):
        target_rows = [next(rows) for _ in range(length + 1)]
        count, final, kept = 0, [], 1.0  # kept: P(the draft tokens so far stay)
        for k, target in enumerate(target_rows):
            drafted = [0.0] * len(target)  # nothing behind the verified slots
            if k < length:
                for t, prob in zip(draft.support[r, k].tolist(), draft.draft_probs[r, k].tolist(), strict=True):
                    drafted[t] += prob
            residual = [max(kept * p - q, 0.0) for p, q in zip(target, drafted, strict=True)]
            ending = 1.0 if kept == 1 else sum(residual) / (sum(residual) + 1 - kept)
            if k == 0 or accept_uniforms[r, k - 1] < ending:  # the last such row counts
                count, final = k, residual if sum(residual) > 0 else target
            if k < length:
                token = int(draft.tokens[r, k])
                kept = min(1.0, kept * target[token] / drafted[token])
        accepted.append(count)
        next_token.append(draw(final, float(target_uniforms[r, count])))
    return Verdict(torch.tensor(accepted), torch.tensor(next_token))


def draw(weights: list[float], u: float) -> int:
    """The first token whose cumulative weight exceeds u times the sum."""
    threshold, cumulative = u * sum(weights), 0.0
    for token, weight in enumerate(weights):
        cumulative += weight
        if cumulative > threshold:
            return token
    raise AssertionError("u must be below 1")
