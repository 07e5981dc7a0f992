"""The copy head: what the Markov head is to language as a whole, it is to the text at hand.

Where the tokens before a slot stood in the context already, what followed them there is likely to follow again. That
token gets a bias, learned by slot and by how many tokens agree. Ours: neither the paper nor the official format has it.
It is a part of the draft distribution like any other, so verification is lossless with it as without.
Shapes: S sequences, T positions, A anchors, R requests, G slots of a block, V' draft vocabulary, n longest match.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dspark.drafters.interface import DraftRequest
from dspark.models import cpu_ops


class Copies(NamedTuple):
    """The token that a slot would copy, and the bias that its logit gets: 0 where there is nothing to copy."""

    tokens: Tensor
    bias: Tensor


class CopyHead(nn.Module):
    """The biases: one a slot and length of the match, the tokens before the slot against an earlier place."""

    def __init__(self, block_size: int, longest: int):
        super().__init__()
        self.bias = nn.Parameter(torch.arange(1.0, longest + 1).repeat(block_size, 1))  # [G, n]

    def forward(self, tokens: Tensor, anchors: Tensor) -> Copies:
        """tokens [S, T] all known, anchors [S, A] -> [S, A, G] each; slot k follows the token k after the anchor."""
        block_size, longest = self.bias.shape
        lengths, followers = matches(tokens, longest)
        slots = torch.arange(block_size, device=tokens.device)
        positions = (anchors[..., None] + slots).clamp(max=tokens.shape[1] - 1).flatten(1)
        shape = (*anchors.shape, block_size)
        lengths, followers = (t.gather(1, positions).view(shape) for t in (lengths, followers))
        return Copies(followers, F.pad(self.bias, (1, 0))[slots, lengths])


def matches(tokens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """For each position of tokens [S, T], how many of the tokens up to it stood together before, at most `longest`, and
    which token followed them there, [S, T] each: at the latest of the places where most of them did.
    """
    length = tokens.shape[1]
    run = (tokens[:, :, None] == tokens[:, None]).tril(-1)  # [S, T, T]: position t, place p before it
    agreeing = run.int()
    for _ in range(longest - 1):
        run = run & F.pad(run[:, :-1, :-1], (1, 0, 1, 0))
        agreeing = agreeing + run
    best = (agreeing * length + torch.arange(length, device=tokens.device)).amax(-1)
    most, place = best // length, best % length
    return most, tokens.gather(1, (place + 1).clamp(max=length - 1))


def latest_match(history: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """`matches` of the last position: history [R, T] with the latest token first, -1 past the earliest -> [R] each."""
    length = history.shape[1]
    suffix = history[:, :longest]
    suffix = F.pad(torch.where(suffix < 0, -2, suffix), (0, longest - suffix.shape[1]), value=-2)  # like no token
    places = F.pad(history, (0, longest - 1), value=-1).unfold(1, longest, 1)  # [R, T, n]
    agreeing = (places == suffix[:, None]).cumprod(-1).sum(-1)
    agreeing[:, 0] = 0
    best = (agreeing * length + torch.arange(length - 1, -1, -1, device=history.device)).amax(-1)
    most, place = best // length, length - 1 - best % length
    return most, history.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)


class CopyBias:
    """The copy head at inference: adds its bias to logits; a request's history lies where its first slot is."""

    def __init__(self, head: CopyHead, t2d: Tensor):
        """t2d [V]: of tokens, the index in the draft vocabulary, -1 outside of it."""
        self.weights = F.pad(head.bias.detach().float(), (1, 0)).contiguous().to(t2d.device)  # [G, 1 + n], 0 for none
        self.ids = t2d

    @property
    def longest(self) -> int:
        return self.weights.shape[1] - 1

    def spans(self, requests: list[DraftRequest]) -> Tensor:
        """[2, R] int64: where each history begins, and its anchor's place."""
        rows = [(r.first_slot, r.first_slot + len(r.token_ids) - 1) for r in requests]
        return torch.tensor(rows, device=self.ids.device).T.contiguous()

    def add_(self, logits: Tensor, history: Tensor, spans: Tensor, previous: Tensor, slot: int) -> Tensor:
        """Of a slot: logits [R, V'], history [slots] of tokens, previous [R] the tokens before it, which are noted.

        Returns how many tokens of each request agree with an earlier place, [R] fp32.
        """
        if cpu_ops.usable(logits) and logits.stride(1) == 1:
            lengths = logits.new_empty(len(logits))
            tensors = history, spans, previous, self.ids, self.weights[slot], logits, lengths
            self.kernel(0, *tensors, slot, 1, logits.stride(0), len(logits))
            return lengths
        first, last = spans[0], spans[1] + slot
        history[last] = previous
        rows = [history[a : b + 1].flip(0) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        lengths, followers = latest_match(pad_sequence(rows, batch_first=True, padding_value=-1), self.longest)
        ids = self.ids[followers]
        bias = torch.where(ids >= 0, self.weights[slot, lengths], 0.0).to(logits.dtype)
        logits.scatter_add_(1, ids.clamp(min=0)[:, None], bias[:, None])
        return lengths.float()

    @property
    def kernel(self) -> cpu_ops.Kernel:
        return cpu_ops.kernel("copy_bias", self.longest)
