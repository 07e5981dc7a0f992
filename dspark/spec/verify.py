"""Lossless verification: which draft tokens stay, and the target's own token after them.

Leviathan et al. 2023 and Chen et al. 2023, on ragged batches: each request has as many draft tokens verified
as the prefix scheduler gave it. Whatever the drafter proposes, the committed tokens follow target_probs
exactly, provided draft_probs is what the draft was really sampled from, and whether a slot is verified does
not depend on its own token or on later ones.

A batch may mix greedy and sampled requests: `truncated_probs` makes the rows of greedy ones one-hot, and
`verify` on one-hot rows is greedy verification. `verify_greedy` is the short cut for an all-greedy batch.

Shapes: R = requests, G = slots of a block (gamma), M = support of a draft distribution, V = vocabulary size,
l_r = verify length of request r, B = sum of 1 + l_r: the target's rows, request after request; row i of a
request is the target's distribution of the token at anchor position + 1 + i. N = any rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.sampling import categorical
from dspark.spec.draft import Draft

__all__ = ["Verdict", "acceptance_probabilities", "residual_probs", "verify", "verify_greedy"]


class Verdict(NamedTuple):
    accepted: Tensor  # [R] int64: accepted draft tokens, 0..l_r
    next_token: Tensor  # [R] int64: the target's token after them, from residual or bonus row


def acceptance_probabilities(target_probs: Tensor, tokens: Tensor, support: Tensor, draft_probs: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of each row's draft token: [N, V], [N], [N, M], [N, M] -> [N]."""
    target_prob = target_probs.gather(-1, tokens[:, None]).squeeze(-1)
    draft_prob = (draft_probs * (support == tokens[:, None])).sum(-1)
    tiny = torch.finfo(draft_prob.dtype).tiny  # padding rows have q(x) = 0; no NaN from them
    return (target_prob / draft_prob.clamp(min=tiny)).clamp(max=1)


def residual_probs(target_probs: Tensor, support: Tensor, draft_probs: Tensor) -> Tensor:
    """The distribution of the token in place of a rejected one, max(p - q, 0) normalised: [N, V].

    Where nothing is left, p equals q up to rounding and a rejection has probability 0: the row is p itself.
    """
    excess = target_probs.scatter_add(-1, support, -draft_probs.to(target_probs.dtype)).clamp_(min=0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass, target_probs)


def verify(
    target_probs: Tensor,  # [B, V]
    draft: Draft,
    verify_lengths: Tensor,  # [R], at most draft.lengths
    accept_uniforms: Tensor,  # [R, G] float64: entry k decides slot k
    target_uniforms: Tensor,  # [R, G + 1] float64: entry k draws the token at anchor position + 1 + k
) -> Verdict:
    """One round for all requests; every draw is given, so the result is a function of the arguments."""
    assert bool((verify_lengths <= draft.lengths).all()), "a slot without a draft token cannot be verified"
    first_row, request, slot = _ragged_index(verify_lengths, len(target_probs))

    # Pass x_k with probability min(1, p_k(x_k) / q_k(x_k)). A slot of padding gives the bonus rows an index.
    tokens = pad(draft.tokens, (0, 1))  # x [R, G+1]
    support = pad(draft.support, (0, 0, 0, 1))  # [R, G+1, M]
    draft_probs = pad(draft.draft_probs, (0, 0, 0, 1))  # q [R, G+1, M]
    chance = acceptance_probabilities(
        target_probs, tokens[request, slot], support[request, slot], draft_probs[request, slot]
    )  # [B]
    passed = pad(accept_uniforms, (0, 1))[request, slot] < chance  # [B]
    accepted = _count_accepted(passed, request, slot, verify_lengths, draft.tokens.shape[1])  # [R]

    # The round ends in one row per request: its first rejection, or the bonus row if nothing was rejected.
    every = torch.arange(len(accepted), device=accepted.device)
    final_probs = target_probs[first_row + accepted]  # [R, V]
    rejected = (accepted < verify_lengths).nonzero().squeeze(-1)
    if len(rejected):
        at = rejected, accepted[rejected]
        final_probs[rejected] = residual_probs(final_probs[rejected], support[at], draft_probs[at])
    return Verdict(accepted, categorical(final_probs, target_uniforms[every, accepted]))


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


def _count_accepted(passed: Tensor, request: Tensor, slot: Tensor, verify_lengths: Tensor, num_slots: int) -> Tensor:
    """How many draft tokens of each request passed before its first failure: [R]."""
    passes = passed.new_zeros(len(verify_lengths), num_slots + 1)
    passes[request, slot] = passed & (slot < verify_lengths[request])  # the bonus row holds no draft token
    return passes.long().cumprod(-1).sum(-1)
