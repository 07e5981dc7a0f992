"""Prefix scheduling: how many draft tokens of each request the target verifies this round (design §5).

Shapes: R requests, G slots.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark.spec.draft import Draft


class PrefixScheduler(Protocol):
    """Chooses verify lengths. Lossless only if l_r never depends on the tokens past slot l_r."""

    def choose(self, draft: Draft) -> Tensor:
        """Verify lengths [R] int64, each at most the draft's own length."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Verify the first `length` slots of every request, whatever the load; the baseline."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"a verify length cannot be negative: {self.length}")

    def choose(self, draft: Draft) -> Tensor:
        return torch.clamp(draft.lengths, max=self.length)
