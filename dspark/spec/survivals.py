"""How long drafts survived in past rounds: over all requests, and of each one.

Everything here may decide about rounds to come, see docs/losslessness.md.
Shapes: R requests, G slots.
"""

from collections.abc import Sequence
from itertools import groupby

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


class Survivals:
    """Survival in past rounds: running means by position, the last blocks of all, and those of each request.

    Figures are of the rounds that `settle` has taken in.
    """

    def __init__(self, decay: float = 0.98):
        """decay: how much less a round weighs than the one after it in the means of all requests."""
        self.decay = decay
        self.samples = 0  # requests drafted for, over all rounds
        self.pending: list[tuple[Floats, Ints, NDArray[np.bool_], Sequence[int]]] = []  # rounds that `settle` takes in
        self.rounds = 0  # taken in
        self.recent: Floats = np.zeros((0, 0))  # [<= KEPT_ROWS, G]: the last whole blocks
        self.totals: Floats = np.zeros(0)  # [G]
        self.counts: Floats = np.zeros(0)  # [G]
        self.means: Floats = np.zeros(0)  # [G], never rising; 0 where nothing was seen yet
        self.falloff: Floats = np.zeros(0)  # [G]: means over the first one's
        self.places: dict[int, int] = {}  # of requests, by id, in the following
        self.own: Floats = np.zeros((0, KEPT_OWN, 0))  # a request's last blocks, in a ring
        self.number: Ints = np.zeros(0, np.int64)  # of its blocks ever
        self.blocks: Floats = np.zeros(0)  # faded number of its blocks
        self.survived: Floats = np.zeros(0)  # faded sum of their survivals
        self.last: Ints = np.zeros(0, np.int64)  # round of its last block

    def observe(self, values: Floats, lengths: Ints, ids: Sequence[int]) -> None:
        """Note a round: survival [R, G], draft lengths [R] and ids [R]. The first ones are taken in soon, later ones
        SETTLED_ROUNDS at once, which takes numpy hardly longer than one if they are of the same requests.

        Blocks may be shorter than the first round's: their last survival goes on as the means fall off."""
        whole = lengths == values.shape[1]
        if (slots := values.shape[1]) < len(self.means):
            last = self.means[slots - 1]
            further = self.means[slots:] / last if last > 0 else np.zeros(len(self.means) - slots)
            values = np.concatenate([values, values[:, -1:] * further], axis=1)
        self.samples += int(np.count_nonzero(lengths))
        self.pending.append((values, lengths, whole, ids))
        if len(self.pending) >= min(self.rounds + 1, SETTLED_ROUNDS):
            self.settle()

    def settle(self) -> None:
        """Take in what is pending."""
        for ids, rounds in groupby(self.pending, key=lambda observed: observed[-1]):
            values, drafted, whole, _ = zip(*rounds)
            self.take_in(np.stack(values), np.stack(drafted), np.stack(whole), ids)
        self.pending = []

    def take_in(self, values: Floats, drafted: Ints, whole: NDArray[np.bool_], ids: Sequence[int]) -> None:
        """Rounds of the same requests: survival [rounds, R, G], draft lengths [rounds, R], blocks not cut short."""
        rounds, _, slots = values.shape
        if not len(self.totals):
            self.totals, self.counts = np.zeros((2, slots))
            self.recent, self.own = np.zeros((0, slots)), np.zeros((0, KEPT_OWN, slots))
        there = np.arange(slots) < drafted[..., None]  # [rounds, R, G]
        of_slot = there.any(1).cumsum(0)  # rounds that drafted it, up to each one: others do not make it fade
        weights = self.decay ** (of_slot[-1] - of_slot)  # [rounds, G]
        kept = self.decay ** of_slot[-1]
        self.totals = kept * self.totals + (weights * (values * there).sum(1)).sum(0)
        self.counts = kept * self.counts + (weights * there.sum(1)).sum(0)
        means = np.divide(self.totals, self.counts, out=np.zeros_like(self.totals), where=self.counts > 0)
        self.means = np.minimum.accumulate(means)
        self.falloff = self.means / self.means[0] if self.means[0] > 0 else np.zeros_like(means)

        at = self.at(ids)
        of_request = whole.cumsum(0)  # whole blocks up to each round
        number, blocks = self.number[at] + of_request, of_request[-1]
        # Where some are chosen for surviving well, only those that were not known yet stand for all.
        typical = whole & (whole.all(1, keepdims=True) | (number == 1))
        self.recent = np.concatenate([self.recent, values[typical]])[-KEPT_ROWS:]
        weights = whole * FADE ** (blocks - of_request)
        self.survived[at] = FADE**blocks * self.survived[at] + (weights * values.sum(2)).sum(0)
        self.blocks[at] = FADE**blocks * self.blocks[at] + weights.sum(0)
        row, column = np.nonzero(whole)  # the latest last, so that it stays where places coincide
        self.own[at[column], (number[whole] - 1) % KEPT_OWN] = values[whole]
        self.last[at[column]] = self.rounds + 1 + row
        self.number[at] = number[-1]
        self.rounds += rounds

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
        any_request = recent[np.arange(rounds * len(ids)) % len(recent)].reshape(rounds, len(ids), -1)
        return np.where(is_own[..., None], self.own[at, turn % KEPT_OWN], any_request)

    def predict(self, first: Floats) -> Floats:
        """Survival [R, G] of today's slots from that of the first [R]: scaled as the means fall off."""
        return first[:, None] * self.falloff
