"""A cost table that follows what steps take at the moment.

A profile is of the minute in which it was taken. Neighbours take memory bandwidth and come and go, requests that
sample need more work a row than greedy ones: what drafting costs beside a plain step may be half as much again as
measured, or less. The shape of the curve stays; three factors of it are fitted to the last steps.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from dspark.spec.cost_table import CostTable

__all__ = ["LiveCosts", "StepTaken"]

FORGET = 0.99  # of what a step says, kept at each later one: about the last hundred count
PRIOR = 0.1  # steps that the profile counts as: a step is off by a tenth, a factor by half, so squares of these
REFRESH = 32  # steps after which the table is made anew; schedulers keep what they computed from one
SURPRISE = 2.0  # times what was expected: a step counts as no more, and as no less than its inverse
LIMIT = 4.0  # of the factors, and of their inverses


@dataclass(frozen=True)
class StepTaken:
    """What a step without prompts did and the seconds it took."""

    requests: int
    batch_tokens: int
    drafted: int  # requests drafted for, blocks of `slots` slots; 0 too where that was not a draft pass as profiled
    slots: int
    draft_seconds: float  # drafting, and choosing what to verify
    other_seconds: float  # all the rest


class LiveCosts:
    """`table` is the profile with three factors: of what a step of one token costs, of what more tokens and requests
    add to that, and of drafts.

    The first two are the ridge regression of measured seconds over expected ones on the shares of the two parts, the
    third is the mean of its own ratio; of steps weighted by age, the profile (1, 1, 1) being worth `PRIOR` steps.
    """

    def __init__(self, profile: CostTable):
        self.profile = self.table = profile
        self._xx = [PRIOR, 0.0, PRIOR]  # sums of products of the shares: first² , first·rest, rest²
        self._xy = [PRIOR, PRIOR]
        self._drafts = [PRIOR, PRIOR]  # sums of ratios, and of weights
        self._steps = 0

    def observe(self, step: StepTaken) -> None:
        expected = _without_drafts(self.profile, step.batch_tokens, step.requests)
        share = min(1.0, _without_drafts(self.profile, 1, 1) / expected)
        x = share, 1.0 - share
        base, rest, _ = self.factors()
        ratio = _unsurprising(step.other_seconds / expected, x[0] * base + x[1] * rest)
        a, b, c = self._xx
        prior = (1 - FORGET) * PRIOR  # it is not forgotten
        self._xx = [
            FORGET * a + x[0] * x[0] + prior,
            FORGET * b + x[0] * x[1],
            FORGET * c + x[1] * x[1] + prior,
        ]
        self._xy = [FORGET * old + share * ratio + prior for old, share in zip(self._xy, x)]
        ratios, weights = self._drafts
        self._drafts = [FORGET * ratios + prior, FORGET * weights + prior]
        if step.drafted:
            ratio = step.draft_seconds / _of_drafts(self.profile, step.drafted, step.slots)
            ratio = _unsurprising(ratio, ratios / weights)
            self._drafts = [self._drafts[0] + ratio, self._drafts[1] + 1.0]
        self._steps += 1
        if self._steps % REFRESH == 0:
            self.table = scaled(self.profile, *self.factors())

    def factors(self) -> tuple[float, float, float]:
        """Of a step of one token, of what more of them add, of drafts."""
        (a, b, c), (y, z) = self._xx, self._xy
        determinant = a * c - b * b  # above 0: the prior makes it so
        base, rest = (c * y - b * z) / determinant, (a * z - b * y) / determinant
        return _bounded(base), _bounded(rest), _bounded(self._drafts[0] / self._drafts[1])


def scaled(table: CostTable, base: float, rest: float, drafts: float) -> CostTable:
    """See `LiveCosts`; factors above 0."""
    first = table.target_seconds[0]
    return replace(
        table,
        step_seconds=base * table.step_seconds,
        target_seconds=tuple(base * first + rest * (seconds - first) for seconds in table.target_seconds),
        context_seconds=rest * table.context_seconds,
        draft_seconds=tuple(drafts * seconds for seconds in table.draft_seconds),
        short_draft_seconds=tuple(drafts * seconds for seconds in table.short_draft_seconds),
    )


@lru_cache(maxsize=4096)
def _without_drafts(profile: CostTable, batch_tokens: int, requests: int) -> float:
    return profile.step_seconds + float(profile.target(batch_tokens, requests))


@lru_cache(maxsize=4096)
def _of_drafts(profile: CostTable, drafted: int, slots: int) -> float:
    return float(profile.draft(drafted, slots))


def _unsurprising(ratio: float, expected: float) -> float:
    return min(max(ratio, expected / SURPRISE), expected * SURPRISE)


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / LIMIT), LIMIT)
