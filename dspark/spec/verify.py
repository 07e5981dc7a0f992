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

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dspark.sampling import categorical
from dspark.spec.draft import Draft
from dspark.spec.survivals import Floats, Ints

__all__ = ["Verdict", "ending_probs", "likelihood_ratios", "residual_weights", "verify", "verify_greedy"]


class Verdict(NamedTuple):
    accepted: Tensor  # [R] int64: accepted draft tokens, 0..l_r
    next_token: Tensor  # [R] int64: the target's token after them, from residual or bonus row


def likelihood_ratios(target_prob: Floats, tokens: Ints, support: Ints, draft_probs: Floats) -> Floats:
    """p(x) / q(x) of each slot's draft token: p(x) and x [...], support and q [..., M] -> [...]."""
    draft_prob = (draft_probs * (support == tokens[..., None])).sum(-1)
    return target_prob / np.maximum(draft_prob, np.finfo(draft_prob.dtype).tiny)  # padding has q(x) = 0; no NaN from it


def ending_probs(target_probs: Floats, draft_probs: Floats, prefix_probs: Floats) -> Floats:
    """P(the round ends before this slot, given that it does not end later): p and q on q's support [..., M], [...].

    prefix_probs: P(all draft tokens before the slot stay), w. With m, the sum of max(w p - q, 0), it is
    m / (m + 1 - w). Where nothing is verified q = 0, so m = w, and that is w.
    """
    overlap = np.minimum(prefix_probs[..., None] * target_probs, draft_probs).sum(-1)
    mass = np.maximum(prefix_probs - overlap, 0)
    return np.where(prefix_probs < 1, mass / np.maximum(mass + 1 - prefix_probs, np.finfo(mass.dtype).tiny), 1.0)


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
    accept_uniforms: ArrayLike,  # [R, G] float64: entry k decides whether the first k + 1 draft tokens stay
    target_uniforms: ArrayLike,  # [R, G + 1] float64: entry k draws the token at anchor position + 1 + k
) -> Verdict:
    """One round for all requests; every draw is given, so the result is a function of the arguments.

    Only what is as wide as the vocabulary stays on the target's device: the rest are small numbers, where the host is
    faster.
    """
    drafted, lengths, tokens, support, draft_probs = (
        t.cpu().numpy() for t in (draft.lengths, verify_lengths, draft.tokens, draft.support, draft.draft_probs)
    )
    assert (lengths <= drafted).all(), "a slot without a draft token cannot be verified"
    requests, vocab = np.arange(len(lengths)), target_probs.shape[1]
    first_row = np.cumsum(lengths + 1) - lengths - 1
    assert first_row[-1] + lengths[-1] + 1 == len(target_probs), "the target must have 1 + verify length rows a request"
    accepted, weights = np.zeros_like(lengths), target_probs  # with nothing verified the residual is p itself
    if len(target_probs) > len(lengths):
        slots = np.arange(draft.tokens.shape[1] + 1)
        verified = slots < lengths[:, None]  # [R, G+1]
        request, slot = verified.nonzero()  # [n]
        x, ids, q = (values[request, slot] for values in (tokens, support, draft_probs))  # [n], [n, M], [n, M]
        wanted = (first_row[request] + slot)[:, None] * vocab + np.concatenate([ids, x[:, None]], 1)
        p = torch.take(target_probs, torch.from_numpy(wanted).to(target_probs.device)).cpu().numpy()  # [n, M+1]
        on_support, of_draft = np.zeros((2, *verified.shape, ids.shape[1]))  # p and q [R, G+1, M], 0 elsewhere
        on_support[verified], of_draft[verified] = p[:, :-1], q
        ratios = np.ones(verified.shape)
        ratios[verified] = likelihood_ratios(p[:, -1], x, ids, q)
        prefix_probs = _prefix_probs(ratios)
        ends = verified | (slots == lengths[:, None])
        ends[:, 1:] &= np.asarray(accept_uniforms) < ending_probs(on_support, of_draft, prefix_probs)[:, 1:]
        accepted = (ends * slots).max(1)  # the longest prefix at which the round may end is kept

        def of_last(values: NDArray, dtype: torch.dtype = target_probs.dtype) -> Tensor:
            """[R, G+1, ...], or [R, G, ...] of what does not matter where nothing was verified -> [R, ...]."""
            chosen = torch.from_numpy(values[requests, accepted.clip(max=values.shape[1] - 1)])
            return chosen.to(dtype).to(target_probs.device)  # first the dtype: not every device has fp64

        rows = target_probs.index_select(0, torch.from_numpy(first_row + accepted).to(target_probs.device))
        weights = residual_weights(rows, of_last(support, torch.int64), of_last(of_draft), of_last(prefix_probs))
    return Verdict(torch.from_numpy(accepted), categorical(weights, np.asarray(target_uniforms)[requests, accepted]))


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


def _prefix_probs(ratios: Floats) -> Floats:
    """P(the draft tokens before slot k stay), given these tokens, by p(x) / q(x) of each: [R, G+1] -> [R, G+1]."""
    probs = np.ones_like(ratios)
    for k in range(1, ratios.shape[1]):
        probs[:, k] = np.minimum(probs[:, k - 1] * ratios[:, k - 1], 1)
    return probs
