"""What a drafter proposes in one round: the only thing that drafters, prefix schedulers and `verify` share.

Shapes: R = requests, G = slots of a block (gamma), M = token ids the draft distribution speaks of,
S = signals of a slot.
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
    lengths: Tensor  # [R] int64: valid slots, 0..G
    # [R, G, S] float: what tells whether token k is accepted, given that all before it were. First its logit by the
    # drafter's confidence head (0 without one), then evidence. They may depend on the tokens before slot k and on the
    # distribution that k is drawn from, never on what is drawn.
    signals: Tensor

    @classmethod
    def unsampled(cls, tokens: Tensor, lengths: Tensor, signals: Tensor) -> "Draft":
        """A draft chosen without randomness, greedily or by n-gram lookup: each distribution is a one-hot."""
        support = tokens[..., None]
        return cls(tokens, support, torch.ones_like(support, dtype=torch.float32), lengths, signals)

    @classmethod
    def empty(cls, requests: int) -> "Draft":
        """One without slots."""
        tokens = torch.zeros(requests, 0, dtype=torch.int64)
        return cls.unsampled(tokens, torch.zeros(requests, dtype=torch.int64), torch.zeros(requests, 0, 1))

    def placed(self, rows: list[int], requests: int) -> "Draft":
        """The same as the given rows, ascending, of a draft for so many requests; the other rows are empty."""
        if len(rows) == requests:
            return self
        index = torch.tensor(rows, dtype=torch.int64)
        fields = (self.tokens, self.support, self.draft_probs, self.lengths, self.signals)  # lengths on the host
        return Draft(*(t.new_zeros(requests, *t.shape[1:]).index_copy_(0, index.to(t.device), t) for t in fields))
