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
        everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        lengths, followers = matches(tokens, everywhere, longest)
        slots = torch.arange(block_size, device=tokens.device)
        positions = (anchors[..., None] + slots).clamp(max=tokens.shape[1] - 1).flatten(1)
        shape = (*anchors.shape, block_size)
        lengths, followers = (t.gather(1, positions).view(shape) for t in (lengths, followers))
        return Copies(followers, F.pad(self.bias, (1, 0))[slots, lengths])


def matches(tokens: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """For positions [S, P] of tokens [S, T], how many of the tokens up to there stood together before, at most
    `longest`, and which token followed them, [S, P] each: at the latest of the places where most of them did.
    """
    length = tokens.shape[1]
    place = torch.arange(length, dtype=torch.int32, device=tokens.device)
    run = place < positions[..., None]  # [S, P, T]: whether all tokens so far agree with those at the place
    agreeing = torch.zeros_like(run, dtype=torch.int32)
    for back in range(longest):
        own = torch.where(positions >= back, tokens.gather(1, (positions - back).clamp(min=0)), -1)
        run = run & (F.pad(tokens, (back, 0), value=-2)[:, None, :length] == own[..., None])
        agreeing = agreeing + run
    best = (agreeing * length + place).amax(-1).long()
    most, latest = best // length, best % length
    return most, tokens.gather(1, (latest + 1).clamp(max=length - 1))


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
        rows = [history[a : b + 1] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        found = matches(pad_sequence(rows, batch_first=True), (last - first)[:, None], self.longest)
        lengths, followers = (of_last[:, 0] for of_last in found)
        ids = self.ids[followers]
        bias = torch.where(ids >= 0, self.weights[slot, lengths], 0.0).to(logits.dtype)
        logits.scatter_add_(1, ids.clamp(min=0)[:, None], bias[:, None])
        return lengths.float()

    @property
    def kernel(self) -> cpu_ops.Kernel:
        return cpu_ops.kernel("copy_bias", self.longest)
