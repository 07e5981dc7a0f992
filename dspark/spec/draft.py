"""What a drafter proposes in one round: the only thing that drafters, prefix schedulers and `verify` share.

Shapes: R = requests, G = slots of a block (gamma), M = token ids the draft distribution speaks of.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draft"]


@dataclass
class Draft:
    """Draft tokens of R requests. Slots at and past a request's length are padding and may hold anything."""

    tokens: Tensor  # [R, G] int64
    support: Tensor  # [R, G, M] int64: ids draft_probs speaks of; every other token has draft probability 0
    # [R, G, M] float, rows sum to 1: the distribution the tokens were really sampled from, after temperature,
    # truncation and pruning; one-hot if they were not sampled. Entries of probability 0 are padding and may
    # repeat an id, positive ones may not.
    draft_probs: Tensor
    confidence_logits: Tensor  # [R, G] float: logit of P(token k is accepted, given that all before it were)
    lengths: Tensor  # [R] int64: valid slots, 0..G

    @classmethod
    def unsampled(cls, tokens: Tensor, confidence_logits: Tensor, lengths: Tensor) -> "Draft":
        """A draft chosen without randomness, greedily or by n-gram lookup: each distribution is a one-hot."""
        support = tokens[..., None]
        return cls(tokens, support, torch.ones_like(support, dtype=torch.float32), confidence_logits, lengths)

    def padded(self, requests: int) -> "Draft":
        """The same with empty rows appended, for requests that nothing was drafted for."""
        more = requests - len(self.lengths)
        if not more:
            return self
        fields = (self.tokens, self.support, self.draft_probs, self.confidence_logits, self.lengths)
        return Draft(*(torch.cat([t, t.new_zeros(more, *t.shape[1:])]) for t in fields))
