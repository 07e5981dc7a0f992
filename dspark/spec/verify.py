"""Lossless verification: which draft tokens stay, and the target's own token after them.

Block verification (Sun et al., ICLR 2025) on ragged batches: each request has as many draft tokens verified as the
prefix scheduler gave it, and these are judged together. Token by token (Leviathan et al. 2023, Chen et al. 2023) a
draft token that the target likes better than the drafter does, p > q, passes and the surplus is lost; here it makes up
for tokens before it that the target likes less. No other way to verify one draft keeps more of it. Of a single draft
token, and of a draft that was not sampled, both ways keep the same.

Whatever the drafter proposes, the committed tokens follow target_probs exactly, provided draft_probs is what the draft
was really sampled from, and whether a slot is verified does not depend on its own token or on later ones.

A batch may mix greedy and sampled requests: `truncated_probs` makes the rows of greedy ones one-hot, and
`verify` on one-hot rows is greedy verification. `verify_greedy` is the short cut for an all-greedy batch.

Shapes: R = requests, G = slots of a block (gamma), M = support of a draft distribution, V = vocabulary size,
l_r = verify length of request r, B = sum of 1 + l_r: the target's rows, request after request; row i of a
request is the target's distribution p of the token at anchor position + 1 + i, after the first i draft tokens; q is the
draft distribution there, and 0 in a request's last row, where nothing is verified. N = any rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.sampling import categorical
from dspark.spec.draft import Draft

__all__ = ["Verdict", "ending_probs", "likelihood_ratios", "residual_weights", "verify", "verify_greedy"]


class Verdict(NamedTuple):
    accepted: Tensor  # [R] int64: accepted draft tokens, 0..l_r
    next_token: Tensor  # [R] int64: the target's token after them, from residual or bonus row


def likelihood_ratios(target_probs: Tensor, tokens: Tensor, support: Tensor, draft_probs: Tensor) -> Tensor:
    """p(x) / q(x) of each row's draft token: [N, V], [N], [N, M], [N, M] -> [N]."""
    target_prob = target_probs.gather(-1, tokens[:, None]).squeeze(-1)
    draft_prob = (draft_probs * (support == tokens[:, None])).sum(-1)
    tiny = torch.finfo(draft_prob.dtype).tiny  # padding rows have q(x) = 0; no NaN from them
    return target_prob / draft_prob.clamp(min=tiny)


def ending_probs(target_probs: Tensor, support: Tensor, draft_probs: Tensor, prefix_probs: Tensor) -> Tensor:
    """P(the round ends before this row's slot, given that it does not end later): [N, V], [N, M], [N, M], [N] -> [N].

    prefix_probs: P(all draft tokens before the row stay), w. With the residual's mass m, the sum of max(w p - q, 0), it
    is m / (m + 1 - w). In a last row q = 0, so m = w, and that is w.
    """
    overlap = torch.minimum(prefix_probs[:, None] * target_probs.gather(-1, support), draft_probs).sum(-1)
    mass = (prefix_probs - overlap).clamp(min=0)
    return torch.where(prefix_probs < 1, mass / (mass + 1 - prefix_probs), 1.0)


def residual_weights(target_probs: Tensor, support: Tensor, draft_probs: Tensor, prefix_probs: Tensor) -> Tensor:
    """The law of the token that ends a round in this row, not normalised: max(w p - q, 0), [N, V].

    Where nothing is left, w p equals q up to rounding and the round ends here with probability 0: it is p itself.
    """
    excess = (prefix_probs[:, None] * target_probs).scatter_add_(-1, support, -draft_probs).clamp_(min=0)
    nothing = excess.sum(-1) == 0
    return torch.where(nothing[:, None], target_probs, excess) if bool(nothing.any()) else excess


def verify(
    target_probs: Tensor,  # [B, V]
    draft: Draft,
    verify_lengths: Tensor,  # [R], at most draft.lengths
    accept_uniforms: Tensor,  # [R, G] float64: entry k decides whether the first k + 1 draft tokens stay
    target_uniforms: Tensor,  # [R, G + 1] float64: entry k draws the token at anchor position + 1 + k
) -> Verdict:
    """One round for all requests; every draw is given, so the result is a function of the arguments."""
    assert bool((verify_lengths <= draft.lengths).all()), "a slot without a draft token cannot be verified"
    first_row, request, slot = _ragged_index(verify_lengths, len(target_probs))
    tokens = pad(draft.tokens, (0, 1))[request, slot]  # x [B]; a slot of padding gives the last rows an index
    support = pad(draft.support, (0, 0, 0, 1))[request, slot]  # [B, M]
    draft_probs = pad(draft.draft_probs, (0, 0, 0, 1))[request, slot].to(target_probs.dtype)  # q [B, M]
    draft_probs.masked_fill_((slot == verify_lengths[request])[:, None], 0.0)

    ratios = target_probs.new_ones(len(verify_lengths), draft.tokens.shape[1] + 1)  # [R, G+1]
    ratios[request, slot] = likelihood_ratios(target_probs, tokens, support, draft_probs)
    prefix_probs = _prefix_probs(ratios)[request, slot]  # [B]
    ending = ending_probs(target_probs, support, draft_probs, prefix_probs)  # [B]; 1 in a request's first row
    ends = pad(accept_uniforms, (1, 0))[request, slot] < ending  # [B]

    # The longest prefix at which the round may end is kept.
    accepted = torch.zeros_like(verify_lengths).scatter_reduce(0, request, slot * ends, "amax")  # [R]
    row = first_row + accepted
    weights = target_probs  # [R, V]
    if len(row) < len(target_probs):  # with nothing verified the residual is p itself
        rows = target_probs.index_select(0, row)  # many times as fast as by []
        weights = residual_weights(rows, support[row], draft_probs[row], prefix_probs[row])
    return Verdict(accepted, categorical(weights, target_uniforms.gather(1, accepted[:, None]).squeeze(1)))


def verify_greedy(target_argmax: Tensor, tokens: Tensor, verify_lengths: Tensor) -> Verdict:
    """`verify` at temperature 0, without probabilities: target_argmax [B], draft tokens [R, G], lengths [R].

    A draft token passes if it is the target's argmax; the next token is the argmax where the round ends.
    """
    argmax, lengths = target_argmax.tolist(), verify_lengths.tolist()
    assert len(argmax) == len(lengths) + sum(lengths), "the target must have 1 + verify length rows for each request"
    accepted, next_token, row = [], [], 0
    for draft, length in zip(tokens.tolist(), lengths, strict=True):
        kept = 0
        while kept < length and draft[kept] == argmax[row + kept]:
            kept += 1
        accepted.append(kept)
        next_token.append(argmax[row + kept])
        row += 1 + length
    return Verdict(*torch.tensor([accepted, next_token], device=target_argmax.device))


def _ragged_index(verify_lengths: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each request begins [R]; which request [B] and slot [B] each row belongs to."""
    counts = verify_lengths + 1
    first_row = counts.cumsum(0) - counts
    request = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    assert len(request) == num_rows, "the target must have 1 + verify length rows for each request"
    slot = torch.arange(num_rows, device=counts.device) - first_row[request]
    return first_row, request, slot


def _prefix_probs(ratios: Tensor) -> Tensor:
    """P(the draft tokens before slot k stay), given these tokens, by p(x) / q(x) of each: [R, G+1] -> [R, G+1]."""
    probs = torch.ones_like(ratios)
    for k in range(1, ratios.shape[1]):
        probs[:, k] = (probs[:, k - 1] * ratios[:, k - 1]).clamp(max=1)
    return probs
