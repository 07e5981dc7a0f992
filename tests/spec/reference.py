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
        count, final = length, target_rows[length]  # if nothing is rejected: the bonus row
        for k in range(length):
            target, token = target_rows[k], int(draft.tokens[r, k])
            drafted = [0.0] * len(target)
            for t, prob in zip(draft.support[r, k].tolist(), draft.draft_probs[r, k].tolist(), strict=True):
                drafted[t] += prob
            if accept_uniforms[r, k] >= min(1.0, target[token] / drafted[token]):
                count, final = k, [max(a - b, 0.0) for a, b in zip(target, drafted, strict=True)]
                if sum(final) == 0:
                    final = target
                break
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
