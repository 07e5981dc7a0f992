"""How long drafts survived in past rounds: over all requests, and of each one.

Everything here may decide about rounds to come, see docs/losslessness.md.
Shapes: R requests, G slots.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Survivals"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SETTLED_ROUNDS = 16  # taken in at once
KEPT_ROWS = 128  # blocks that stand for the mix of easy and hard ones
KEPT_OWN = 32  # of one request
FADE = 0.95  # how much less a request's block weighs than its next one
NEVER = 1 << 30  # rounds since a block that there was not
DOUBT = 4.0  # blocks of its own after which a request is trusted as much as all requests' mean


@dataclass
class _Own:
    """One request's past."""

    blocks: deque[Floats] = field(default_factory=lambda: deque(maxlen=KEPT_OWN))  # the last ones [G], the newest first
    count: float = 0.0  # faded number of its blocks
    survived: float = 0.0  # faded sum of their survivals
    last: int = -NEVER  # round of the last one


class Survivals:
    """Survival in past rounds: running means by position, the last blocks of all, and those of each request.

    Figures are of the rounds that `settle` has taken in.
    """

    def __init__(self, decay: float = 0.98):
        """decay: how much less a round weighs than the one after it in the means of all requests."""
        self.decay = decay
        self.samples = 0  # requests drafted for, over all rounds
        self.pending: list[tuple[Floats, Ints, Sequence[int]]] = []  # rounds that `settle` takes in
        self.rounds = 0  # taken in
        self.recent: deque[Floats] = deque(maxlen=KEPT_ROWS)  # the last whole blocks [G]
        self.totals = self.counts = np.zeros(0)  # [G]
        self.means: Floats = np.zeros(0)  # [G], never rising; 0 where nothing was seen yet
        self.own: dict[int, _Own] = {}  # by request

    @property
    def slots(self) -> int:
        """Of a whole block."""
        return len(self.means)

    def observe(self, values: Floats, lengths: Ints, ids: Sequence[int]) -> None:
        """Note a round: survival [R, G], draft lengths [R] and ids [R]. The first ones are taken in soon, later ones
        SETTLED_ROUNDS at once: code that runs every round after the model's weights have gone through the caches takes
        several times as long as code that runs again.

        Blocks may be shorter than the first round's: their last survival goes on as the means fall off."""
        self.samples += int(np.count_nonzero(lengths))
        self.pending.append((values, lengths, ids))
        if len(self.pending) >= min(self.rounds + 1, SETTLED_ROUNDS):
            self.settle()

    def settle(self) -> None:
        """Take in what is pending."""
        for observed in self.pending:
            self.take_in(*observed)
        self.pending = []

    def take_in(self, values: Floats, lengths: Ints, ids: Sequence[int]) -> None:
        """One round, see `observe`."""
        whole = lengths == values.shape[1]
        if (slots := values.shape[1]) < len(self.means):
            last = self.means[slots - 1]
            further = self.means[slots:] / last if last > 0 else np.zeros(len(self.means) - slots)
            values = np.concatenate([values, values[:, -1:] * further], axis=1)
        if not self.rounds:
            self.totals, self.counts = np.zeros((2, slots))
        self.rounds += 1
        there = np.arange(values.shape[1]) < lengths[:, None]  # [R, G]
        kept = np.where(there.any(0), self.decay, 1.0)  # rounds that did not draft a slot do not make it fade
        self.totals = kept * self.totals + (values * there).sum(0)
        self.counts = kept * self.counts + there.sum(0)
        means = np.divide(self.totals, self.counts, out=np.zeros_like(self.totals), where=self.counts > 0)
        self.means = np.minimum.accumulate(means)

        if len(self.own) > 2 * len(ids):  # most of them have ended
            self.own = {i: self.own[i] for i in ids if i in self.own}
        everyone, sums = bool(whole.all()), values.sum(1).tolist()
        for row in np.flatnonzero(whole).tolist():
            own = self.own.setdefault(ids[row], _Own())
            # Where some are chosen for surviving well, only those that were not known yet stand for all.
            if everyone or not own.blocks:
                self.recent.append(values[row])
            own.blocks.appendleft(values[row])
            own.count, own.survived = FADE * own.count + 1, FADE * own.survived + sums[row]
            own.last = self.rounds

    def levels(self, ids: Sequence[int]) -> tuple[Floats, Ints]:
        """Tokens that a block of each request is expected to add, and for how many rounds it had none, [R]."""
        self.settle()
        mean = float(np.sum(self.recent or self.means)) / max(1, len(self.recent))
        own = [self.own.get(i, _Own()) for i in ids]
        levels = [(one.survived + DOUBT * mean) / (one.count + DOUBT) for one in own]
        return np.array(levels), np.array([self.rounds - one.last for one in own])

    def rounds_like(self, ids: Sequence[int]) -> Floats:
        """Past blocks as rounds of these requests, [rounds, R, G]: their own as far as known, else any request's."""
        self.settle()
        rounds, recent = max(2, KEPT_ROWS // len(ids)), list(self.recent) or [self.means]
        blocks = np.empty((rounds, len(ids), len(self.means)))
        for column, own in enumerate(self.own.get(i, _Own()) for i in ids):
            trusted = round(rounds * own.count / (own.count + DOUBT))
            for row in range(rounds):  # the newest first, again and again
                known = own.blocks[row % len(own.blocks)] if row < trusted else None
                blocks[row, column] = recent[(row * len(ids) + column) % len(recent)] if known is None else known
        return blocks

    def predict(self, first: Floats) -> Floats:
        """Survival [R, G] of today's slots from that of the first [R]: scaled as the means fall off."""
        return first[:, None] * (self.means / max(self.means[0], np.finfo(np.float64).tiny))
