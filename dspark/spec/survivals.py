"""How long drafts survived in past rounds: over all requests, and of each one.

Everything here may decide about rounds to come, see docs/losslessness.md.
Shapes: R requests, G slots.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Survivals"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KEPT_ROWS = 128  # blocks that stand for the mix of easy and hard ones
KEPT_OWN = 32  # of one request
FADE = 0.95  # how much less a request's block weighs than its next one
NEVER = 1 << 30  # rounds since a block that there was not
DOUBT = 4.0  # blocks of its own after which a request is trusted as much as all requests' mean


class Survivals:
    """Survival in past rounds: running means by position, the last blocks of all, and those of each request."""

    def __init__(self, decay: float = 0.98):
        """decay: how much less a round weighs than the one after it in the means of all requests."""
        self.decay = decay
        self.recent: Floats = np.zeros((0, 0))  # [<= KEPT_ROWS, G]: the last whole blocks
        self.totals: Floats = np.zeros(0)  # [G]
        self.counts: Floats = np.zeros(0)  # [G]
        self.pending: list[tuple[Floats, NDArray[np.bool_], Sequence[int]]] = []  # rounds that `settle` takes in
        self.rounds = 0
        self.places: dict[int, int] = {}  # of requests, by id, in the following
        self.own: Floats = np.zeros((0, KEPT_OWN, 0))  # a request's last blocks, in a ring
        self.number: Ints = np.zeros(0, np.int64)  # of its blocks ever
        self.blocks: Floats = np.zeros(0)  # faded number of its blocks
        self.survived: Floats = np.zeros(0)  # faded sum of their survivals
        self.last: Ints = np.zeros(0, np.int64)  # round of its last block

    def observe(self, values: Floats, lengths: Tensor, ids: Sequence[int]) -> None:
        """Take in a round: survival [R, G], draft lengths [R] and ids [R]."""
        drafted, slots = lengths.numpy(force=True), values.shape[1]
        if not len(self.totals):
            self.totals, self.counts = np.zeros((2, slots))
            self.own = np.zeros((0, KEPT_OWN, slots))
        self.totals = self.decay * self.totals + values.sum(0)
        self.counts = self.decay * self.counts + (np.arange(slots) < drafted[:, None]).sum(0)
        self.pending.append((values, drafted == slots, ids))
        if len(self.pending) == KEPT_ROWS:
            self.settle()

    def settle(self) -> None:
        """Take in what concerns single requests: many rounds at once cost less than each in the middle of a step."""
        for values, whole, ids in self.pending:
            self.rounds += 1
            at = self.at(ids)[whole]
            values = values[whole]
            # Where some are chosen for surviving well, only those that were not known yet stand for all.
            typical = values if len(at) == len(ids) else values[self.number[at] == 0]
            self.recent = np.concatenate([self.recent.reshape(-1, values.shape[1]), typical])[-KEPT_ROWS:]
            self.survived[at] = FADE * self.survived[at] + values.sum(1)
            self.blocks[at] = FADE * self.blocks[at] + 1
            self.last[at] = self.rounds
            self.own[at, self.number[at] % KEPT_OWN] = values
            self.number[at] += 1
        self.pending = []

    def at(self, ids: Sequence[int]) -> Ints:
        """Places of requests [R]; new ones get theirs, where need be those of requests that run no more."""
        if new := [i for i in ids if i not in self.places]:
            if len(self.places) + len(new) > len(self.number):
                old = [i for i in ids if i in self.places]
                kept = np.array([self.places[i] for i in old], dtype=np.int64)
                room = 2 * len(ids) - len(old)
                self.own = np.concatenate([self.own[kept], np.zeros((room, KEPT_OWN, len(self.totals)))])
                for name in ("number", "blocks", "survived", "last"):
                    values = getattr(self, name)[kept]
                    setattr(self, name, np.concatenate([values, np.zeros(room, values.dtype)]))
                self.places = {i: place for place, i in enumerate(old)}
            self.places |= {i: place for place, i in enumerate(new, len(self.places))}
        return np.array([self.places[i] for i in ids])

    def levels(self, ids: Sequence[int]) -> tuple[Floats, Ints]:
        """Tokens that a block of each request is expected to add, and for how many rounds it had none, [R]."""
        self.settle()
        at = self.at(ids)
        mean = float(self.recent.sum(1).mean()) if len(self.recent) else float(self.means.sum())
        idle = np.where(self.number[at] > 0, self.rounds - self.last[at], NEVER)
        return (self.survived[at] + DOUBT * mean) / (self.blocks[at] + DOUBT), idle

    def rounds_like(self, ids: Sequence[int]) -> Floats:
        """Past blocks as rounds of these requests, [rounds, R, G]: their own as far as known, else any request's."""
        self.settle()
        at, recent = self.at(ids), self.recent if len(self.recent) else self.means[None]
        rounds = max(2, KEPT_ROWS // len(ids))
        age = np.arange(rounds)[:, None]
        number, blocks = self.number[at], self.blocks[at]
        turn = number - 1 - age % np.clip(number, 1, KEPT_OWN)  # [rounds, R]: the newest first, again and again
        is_own = age < np.rint(rounds * blocks / (blocks + DOUBT))
        any_request = np.resize(recent, (rounds, len(ids), recent.shape[1]))
        return np.where(is_own[..., None], self.own[at, turn % KEPT_OWN], any_request)

    @property
    def samples(self) -> float:
        return float(self.counts[0]) if len(self.counts) else 0.0

    @property
    def means(self) -> Floats:
        """[G], never rising; 0 where nothing was seen yet."""
        means = np.divide(self.totals, self.counts, out=np.zeros_like(self.totals), where=self.counts > 0)
        return np.minimum.accumulate(means) if len(means) else means

    def predict(self, first: Floats) -> Floats:
        """Survival [R, G] of today's slots from that of the first [R]: scaled as the means fall off."""
        means = self.means
        return first[:, None] * (means / means[0] if means[0] > 0 else np.zeros_like(means))
