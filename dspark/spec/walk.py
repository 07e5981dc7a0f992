"""The walk that prefix schedulers take over the draft tokens of a round, and where it pays to stop (design §5).

Pure functions of survivals and a cost table; `prefix_scheduler.py` says what makes a stop lossless.
Shapes: R requests, G slots, n = slots with a draft token of all requests together.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from dspark.spec.cost_table import CostTable
from dspark.spec.survivals import Floats, Ints


@dataclass(frozen=True)
class Load:
    """What is known of a step before anything is drafted."""

    ids: tuple[int, ...]  # of the requests that decode, the oldest first
    other_tokens: int = 0  # of prompts, in the same batch

    @property
    def requests(self) -> int:
        return len(self.ids)


class Drafted(NamedTuple):
    """What was drafted in a step: for how many requests, blocks of how many slots."""

    requests: int
    slots: int


class Walk(NamedTuple):
    """All draft tokens in the order in which they may be verified."""

    request: Ints  # [n]: whose token is the i-th
    survival: Floats  # [n], descending

    def lengths(self, count: int, num_requests: int) -> Ints:
        """Verify lengths [R] of the first `count` tokens of the walk: they are prefixes of each request's draft."""
        return np.bincount(self.request[:count], minlength=num_requests)


def survival(confidence: Floats, lengths: Ints) -> Floats:
    """a_k = product of c_1..c_k, [R, G]; NaN counts as 0, everything is clipped to 0..1, padding is 0."""
    c = np.minimum(np.fmax(confidence, 0.0), 1.0)  # fmax of NaN and 0 is 0
    c *= np.arange(c.shape[1]) < lengths[:, None]
    return np.cumprod(c, axis=1, out=c)


def walk(values: Floats, lengths: Ints) -> Walk:
    """Slots by descending survival [R, G], ties by (request, position), padding left out."""
    requests, slots = values.shape
    if requests == 1:  # in order already
        alone = values[0, : lengths[0]]
        return Walk(np.zeros(len(alone), np.int64), alone)
    valid = np.arange(slots) < lengths[:, None]
    request, flat = np.nonzero(valid)[0], values[valid]
    order = np.argsort(-flat, kind="stable")
    return Walk(request[order], flat[order])


@lru_cache(maxsize=4096)
def step_seconds(costs: CostTable, requests: int, other_tokens: int, drafted: int, slots: int, tokens: int) -> Floats:
    """Seconds of a step that verifies 0..tokens draft tokens, less what its prompts cost on top of plain decoding.

    Prompts must be computed whatever is drafted. Counted in, they make a step look so slow that draft tokens pay
    which cost more than the tokens of an ordinary step. drafted: requests that are drafted for, with blocks of `slots`.
    """
    before = requests + other_tokens
    prompts = costs.target(before, requests) - costs.target(requests, requests)
    seconds = costs.seconds(before + np.arange(tokens + 1), requests, drafted, slots) - prompts
    seconds.setflags(write=False)  # it is shared
    return seconds


def rates(values: Floats, costs: CostTable, load: Load, drafted: Drafted) -> list[float]:
    """tau·SPS(B), expected tokens a second, if the first 0..n slots are verified: survival [n] -> n + 1.

    Entry i depends on the first i values only. SPS counts the time of drafting, not that of prompts.
    """
    seconds = step_seconds(costs, load.requests, load.other_tokens, *drafted, len(values)).tolist()
    taus = accumulate(values.tolist(), initial=float(load.requests))  # a request gets one token without draft tokens
    return [tau / of_step for tau, of_step in zip(taus, seconds, strict=True)]


def first_stop(rate: list[float], start: int = 0) -> int:
    """The first slot from `start` on that does not strictly raise the rate."""
    while start + 1 < len(rate) and rate[start + 1] > rate[start]:
        start += 1
    return start


def algorithm_1(values: Floats, costs: CostTable, load: Load, drafted: Drafted) -> int:
    """DSpark, Algorithm 1: admit while the rate strictly rises, stop at the first slot that does not raise it."""
    return first_stop(rates(values, costs, load, drafted))


def best_budget(values: Floats, costs: CostTable, load: Load, drafted: Drafted) -> int:
    """The best number of slots over all, the least of equals. NOT lossless on the survivals of today's walk."""
    rate = rates(values, costs, load, drafted)
    return rate.index(max(rate))


def foresight(values: Floats, budget: int, costs: CostTable, load: Load, drafted: Drafted) -> int:
    """Verify `budget` slots, fixed beforehand: fewer where nothing can be gained any more, more by Algorithm 1.

    values [n] is today's walk. At step i it looks at the first i + 1 of it. No later slot survives more surely than
    slot i + 1, so after m more steps the rate is at most (tau_i + m·a_{i+1}) · SPS(B_i + m). Between two sizes of the
    cost table that is monotone in m, so the best of it is found at the table's sizes.
    """
    rate = rates(values, costs, load, drafted)
    stop, ahead = first_stop(rate), min(budget, len(values))
    if stop >= ahead:  # while the rate rises, its bound is higher too
        return stop
    seconds = step_seconds(costs, load.requests, load.other_tokens, *drafted, len(values))
    counts = measured_counts(costs, load.requests + load.other_tokens, len(values))  # [P]
    so_far, after = np.array(rate[stop:ahead]), np.array(rate[stop + 1 : ahead + 1])  # [ahead - stop]
    more = counts - np.arange(stop, ahead)[:, None]  # m [ahead - stop, P]
    bound = ((so_far * seconds[stop:ahead])[:, None] + more * values[stop:ahead, None]) / seconds[counts]
    go_on = (after > so_far) | (np.where(more > 0, bound, 0.0).max(1) > so_far)
    return first_stop(rate, ahead) if go_on.all() else stop + int(go_on.argmin())


@lru_cache(maxsize=4096)
def measured_counts(costs: CostTable, batch_tokens: int, slots: int) -> Ints:
    """How many draft tokens, `slots` at most and among them, bring a step to a size of the cost table."""
    return np.array([n - batch_tokens for n in costs.batch_tokens if 0 < n - batch_tokens < slots] + [slots])
