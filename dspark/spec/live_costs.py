"""A cost table that follows what steps take at the moment.

A profile is of the minute in which it was taken. Neighbours take memory bandwidth and come and go, requests that
sample need more work a row than greedy ones: what drafting costs beside a plain step may be half as much again as
measured, or less. The shape of the curves stays; four factors of them are fitted to a few sizes measured again when an
engine starts, and to its last steps after that.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from dspark.spec.cost_table import CostTable

__all__ = ["LiveCosts", "StepTaken", "at_present"]

FORGET = 0.995  # of what a step says, kept at each later one: about the last two hundred count
PRIOR = 0.5  # steps that the profile counts as, few enough to be forgotten where steps tell the two parts apart
REFRESH = 32  # steps after which the table is made anew; schedulers keep what they computed from one
SURPRISE = 2.0  # times what was expected: a step counts as no more, and as no less than its inverse
LIMIT = 8.0  # of the factors, and of their inverses
REPEATS = 64  # how often each size measured again is counted, so that the profile hardly does


@dataclass(frozen=True)
class StepTaken:
    """What a step without prompts did and the seconds it took."""

    requests: int
    batch_tokens: int
    drafted: int  # requests drafted for, blocks of `slots` slots; 0 too where that was not a draft pass as profiled
    slots: int
    draft_seconds: float  # drafting, and choosing what to verify
    other_seconds: float  # all the rest


class _Factors:
    """Of two parts of what something takes: the ridge regression of measured seconds over expected ones on the shares
    of the parts, of observations weighted by age, the profile (1, 1) being worth `PRIOR` of them."""

    def __init__(self):
        self._xx = [PRIOR, 0.0, PRIOR]  # sums of products of the shares: first², first·rest, rest²
        self._xy = [PRIOR, PRIOR]

    def forget(self) -> None:
        prior = (1 - FORGET) * PRIOR  # it is not forgotten
        a, b, c = self._xx
        self._xx = [FORGET * a + prior, FORGET * b, FORGET * c + prior]
        self._xy = [FORGET * y + prior for y in self._xy]

    def observe(self, first: float, whole: float, measured: float) -> None:
        """Expected seconds, of the first part and of both."""
        share = min(1.0, first / whole)
        x = share, 1.0 - share
        expected = sum(factor * part for factor, part in zip(self.values(), x))
        ratio = min(max(measured / whole, expected / SURPRISE), expected * SURPRISE)
        a, b, c = self._xx
        self._xx = [a + x[0] * x[0], b + x[0] * x[1], c + x[1] * x[1]]
        self._xy = [y + part * ratio for y, part in zip(self._xy, x)]

    def values(self) -> tuple[float, float]:
        (a, b, c), (y, z) = self._xx, self._xy
        determinant = a * c - b * b  # above 0: the prior makes it so
        first, rest = (c * y - b * z) / determinant, (a * z - b * y) / determinant
        return min(max(first, 1 / LIMIT), LIMIT), min(max(rest, 1 / LIMIT), LIMIT)


class LiveCosts:
    """`table` is the profile with four factors: of what a step of one token costs and of what more tokens and requests
    add to that; of a draft pass with short blocks and of what longer ones add."""

    def __init__(self, profile: CostTable):
        self.profile = self.table = profile
        self._step, self._draft = _Factors(), _Factors()
        self._steps = 0

    def observe(self, step: StepTaken) -> None:
        self._step.forget()
        self._draft.forget()
        one, whole = (_without_drafts(self.profile, *size) for size in ((1, 1), (step.batch_tokens, step.requests)))
        self._step.observe(one, whole, step.other_seconds)
        if step.drafted:
            lengths = min(step.slots, self.profile.short_slots), step.slots
            short, whole = (_of_drafts(self.profile, step.drafted, slots) for slots in lengths)
            self._draft.observe(short, whole, step.draft_seconds)
        self._steps += 1
        if self._steps % REFRESH == 0:
            self.table = scaled(self.profile, *self.factors())

    def factors(self) -> tuple[float, float, float, float]:
        """Of a step of one token, of what more of them add; of short drafts, of what more slots add."""
        return *self._step.values(), *self._draft.values()


def at_present(profile: CostTable, now: CostTable) -> CostTable:
    """The profile with the factors of `LiveCosts` that a few sizes, measured again `now`, ask for."""
    sizes = [(tokens, 0, 0) for tokens in now.batch_tokens]
    sizes += [(requests, requests, slots) for requests in now.requests for slots in (now.short_slots, now.slots)]
    live = LiveCosts(profile)
    for tokens, drafted, slots in REPEATS * sizes:
        other_seconds = now.step_seconds + float(now.target(tokens, tokens))
        live.observe(StepTaken(tokens, tokens, drafted, slots, float(now.draft(drafted, slots)), other_seconds))
    return scaled(profile, *live.factors())


def scaled(table: CostTable, base: float, rest: float, drafts: float, slots: float) -> CostTable:
    """See `LiveCosts`; factors above 0."""
    first, short = table.target_seconds[0], table.short_draft_seconds or table.draft_seconds
    whole_drafts = [drafts * s + slots * (whole - s) for s, whole in zip(short, table.draft_seconds)]
    return replace(
        table,
        step_seconds=base * table.step_seconds,
        target_seconds=tuple(base * first + rest * (seconds - first) for seconds in table.target_seconds),
        context_seconds=rest * table.context_seconds,
        draft_seconds=tuple(accumulate(whole_drafts, max)),  # where more requests made slots cheaper, that was noise
        short_draft_seconds=tuple(drafts * seconds for seconds in table.short_draft_seconds),
    )


@lru_cache(maxsize=4096)
def _without_drafts(profile: CostTable, batch_tokens: int, requests: int) -> float:
    return profile.step_seconds + float(profile.target(batch_tokens, requests))


@lru_cache(maxsize=4096)
def _of_drafts(profile: CostTable, drafted: int, slots: int) -> float:
    return float(profile.draft(drafted, slots))
