"""Prefix scheduling: how many draft tokens of each request the target verifies this round (design §5).

**Lossless** means: whether a draft token is verified may depend on past rounds, on the tokens before it in its own
request, and on tokens of other requests that are verified anyway; never on itself or on a token after it. All
schedulers below keep to that in one way: they *walk* the slots of all requests in descending survival and stop
somewhere. Survival never rises along a request and ties go by (request, position), so the next slot of the walk is
always the first unverified one of its request, and its survival depends on verified tokens only. What is left to
show for each is that the decision to stop looks no further. docs/losslessness.md goes through them one by one.

Shapes: R requests, G slots, n = slots with a draft token of all requests together.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dspark.spec.cost_table import CostTable

__all__ = [
    "FixedLength",
    "Foresight",
    "Load",
    "PrefixScheduler",
    "StaleBudget",
    "SurvivalMeans",
    "Threshold",
    "ThroughputGreedy",
    "Walk",
    "algorithm_1",
    "best_budget",
    "decode_seconds",
    "foresight",
    "rates",
    "survival",
    "walk",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """What is known of a step before anything is drafted."""

    requests: int  # that decode
    other_tokens: int = 0  # of prompts, in the same batch


class PrefixScheduler(Protocol):
    """Chooses verify lengths, once a round and in the order of rounds: it may remember what it saw."""

    def requests_to_draft(self, load: Load) -> int:
        """For how many of the decoding requests, the oldest first, to draft this round; asked before drafting."""
        ...

    def choose(self, confidence: Tensor, lengths: Tensor, load: Load) -> Tensor:
        """Verify lengths [R] int64 from confidence [R, G] and draft lengths [R], which they never exceed.

        Slots at and past a request's length are padding; confidence may be anything, NaN too.
        """
        ...


# ---- pure functions: from confidence to verify lengths


class Walk(NamedTuple):
    """All draft tokens in the order in which they may be verified."""

    request: Ints  # [n]: whose token is the i-th
    survival: Floats  # [n], descending

    def lengths(self, count: int, num_requests: int) -> Tensor:
        """Verify lengths [R] of the first `count` tokens of the walk: they are prefixes of each request's draft."""
        return torch.from_numpy(np.bincount(self.request[:count], minlength=num_requests))


def survival(confidence: Tensor, lengths: Tensor) -> Floats:
    """a_k = product of c_1..c_k, [R, G] float64; NaN counts as 0, everything is clipped to 0..1, padding is 0."""
    c = confidence.numpy(force=True).astype(np.float64)
    c = np.where(c > 0, np.minimum(c, 1.0), 0.0)  # NaN > 0 is false
    c[np.arange(c.shape[1]) >= lengths.numpy(force=True)[:, None]] = 0.0
    return np.cumprod(c, axis=1, dtype=np.float64)


def walk(values: Floats, lengths: Tensor) -> Walk:
    """Slots by descending survival [R, G], ties by (request, position), padding left out."""
    valid = np.arange(values.shape[1]) < lengths.numpy(force=True)[:, None]
    request, _ = np.nonzero(valid)
    flat = values[valid]
    order = np.argsort(-flat, kind="stable")
    return Walk(request[order], flat[order])


def decode_seconds(costs: CostTable, load: Load, batch_tokens: ArrayLike, requests_drafted: ArrayLike = 0) -> Floats:
    """Seconds of a step, elementwise, less what its prompt tokens cost on top of plain decoding.

    Prompts must be computed whatever is drafted. Counted in, they make a step look so slow that draft tokens pay
    which cost more than the tokens of an ordinary step.
    """
    requests = load.requests
    prompts = costs.target(requests + load.other_tokens, requests) - costs.target(requests, requests)
    return costs.seconds(batch_tokens, requests, requests_drafted) - prompts


def rates(values: Floats, costs: CostTable, load: Load) -> Floats:
    """tau·SPS(B), expected tokens a second, if the first 0..n slots are verified: survival [n] -> [n + 1].

    Entry i depends on the first i values only. SPS counts the time of drafting for all requests, not that of prompts.
    """
    tau = load.requests + np.cumsum(np.append(0.0, values))  # a request without draft tokens still gets one token
    batch_tokens = load.requests + load.other_tokens + np.arange(len(values) + 1)
    return tau / decode_seconds(costs, load, batch_tokens, load.requests)


def first_false(go_on: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return int(np.append(go_on, False).argmin())


def algorithm_1(values: Floats, costs: CostTable, load: Load) -> int:
    """DSpark, Algorithm 1: admit while the rate strictly rises, stop at the first slot that does not raise it."""
    rate = rates(values, costs, load)
    return first_false(rate[1:] > rate[:-1])


def best_budget(values: Floats, costs: CostTable, load: Load) -> int:
    """The best number of slots over all, the least of equals. NOT lossless on the survivals of today's walk."""
    return int(rates(values, costs, load).argmax())


def foresight(values: Floats, budget: int, costs: CostTable, load: Load) -> int:
    """Verify `budget` slots, fixed beforehand: fewer where nothing can be gained any more, more by Algorithm 1.

    values [n] is today's walk. At step i it looks at the first i + 1 of it. No later slot survives more surely than
    slot i + 1, so after m more steps the rate is at most (tau_i + m·a_{i+1}) · SPS(B_i + m). Between two sizes of the
    cost table that is monotone in m, so the best of it is found at the table's sizes.
    """
    rate = rates(values, costs, load)
    steps = np.arange(len(values))
    go_on = rate[1:] > rate[:-1]  # past the budget
    ahead = min(budget, len(values))
    if ahead:
        base = load.requests + load.other_tokens
        last = base + len(values)
        sizes = np.array([size for size in costs.batch_tokens if base < size < last] + [last])  # [P]
        tau = load.requests + np.cumsum(np.append(0.0, values[: ahead - 1]))  # [ahead]
        more = sizes - (base + steps[:ahead, None])  # m [ahead, P]
        bound = (tau[:, None] + more * values[:ahead, None]) / decode_seconds(costs, load, sizes, load.requests)
        go_on[:ahead] = np.where(more > 0, bound, 0.0).max(1) > rate[:ahead]
    return first_false(go_on)


# ---- what past rounds tell


KEPT_ROWS = 128  # blocks that stand for the mix of easy and hard ones
ASK_EVERY = 8  # rounds of the same load that one answer to "does drafting pay" holds for
PAYS = 1.03  # times plain decoding that drafting must promise: costs and survivals are estimates
PROBES = 4  # requests drafted for, now and then, while drafting does not pay


class SurvivalMeans:
    """Survival in past rounds: running means by position, older ones exponentially forgotten, and the last blocks."""

    def __init__(self, decay: float = 0.98):
        self.decay = decay
        self.recent: Floats = np.zeros((0, 0))  # [<= KEPT_ROWS, G]: the last whole blocks
        self.totals: Floats = np.zeros(0)  # [G]
        self.counts: Floats = np.zeros(0)  # [G]

    def observe(self, values: Floats, lengths: Tensor) -> None:
        """Take in a round: survival [R, G] and draft lengths [R]."""
        valid = np.arange(values.shape[1]) < lengths.numpy(force=True)[:, None]
        if not len(self.totals):
            self.totals, self.counts = np.zeros((2, values.shape[1]))
        self.totals = self.decay * self.totals + values.sum(0)
        self.counts = self.decay * self.counts + valid.sum(0)
        whole = values[valid.all(1)]
        self.recent = np.concatenate([self.recent.reshape(-1, values.shape[1]), whole])[-KEPT_ROWS:]

    @property
    def samples(self) -> float:
        return float(self.counts[0]) if len(self.counts) else 0.0

    @property
    def means(self) -> Floats:
        """[G], never rising; 0 where nothing was seen yet."""
        means = np.divide(self.totals, self.counts, out=np.zeros_like(self.totals), where=self.counts > 0)
        return np.minimum.accumulate(means) if len(means) else means

    def samples_of(self, requests: int) -> Floats:
        """Survivals of past blocks as rounds of `requests` of them, descending in each: [rounds, requests * G]."""
        recent = self.recent if len(self.recent) else self.means[None]
        rounds = max(1, len(recent) // requests)
        return -np.sort(-np.resize(recent, (rounds, requests * recent.shape[1])), axis=1)

    def predict(self, first: Floats) -> Floats:
        """Survival [R, G] of today's slots from that of the first [R]: scaled as the means fall off."""
        means = self.means
        return first[:, None] * (means / means[0] if means[0] > 0 else np.zeros_like(means))


# ---- schedulers


@dataclass(frozen=True)
class FixedLength:
    """Verify the first `length` slots of every request, whatever the load; the baseline."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"a verify length cannot be negative: {self.length}")

    def requests_to_draft(self, load: Load) -> int:
        return load.requests if self.length else 0

    def choose(self, confidence: Tensor, lengths: Tensor, load: Load) -> Tensor:
        return torch.clamp(lengths, max=self.length)


@dataclass(frozen=True)
class Threshold:
    """Verify the slots whose survival is at least `threshold`, whatever the load."""

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, got {self.threshold}")

    def requests_to_draft(self, load: Load) -> int:
        return load.requests

    def choose(self, confidence: Tensor, lengths: Tensor, load: Load) -> Tensor:
        return torch.from_numpy((survival(confidence, lengths) >= self.threshold).sum(1))


class _CostBased:
    """The frame of the three below: whether to draft, the walk, what is remembered after the choice."""

    def __init__(self, costs: CostTable, decay: float = 0.98, warm_up: int = 16, retry_every: int = 64):
        """Drafts until about `warm_up` requests were seen, and at least every `retry_every`-th round from then on."""
        self.costs, self.warm_up, self.retry_every = costs, warm_up, retry_every
        self.history = SurvivalMeans(decay)
        self.rounds_without = self.rounds_asked = 0
        self.asked, self.pays = Load(0), True

    def requests_to_draft(self, load: Load) -> int:
        """All, if rounds like the past ones are expected to give more tokens a second than a plain step.

        Else none, and every `retry_every`-th round a few. It must pay without the prompts of this step too: they
        take the curve of costs to places where it may be flat by chance.
        """
        if self.history.samples >= self.warm_up:
            if self.rounds_asked % ASK_EVERY == 0 or load != self.asked:
                plain = load.requests / self.costs.seconds(load.requests, load.requests)
                rate = min(self.expected_rate(way) for way in {load, Load(load.requests)})
                self.asked, self.pays = load, rate > PAYS * plain
            self.rounds_asked += 1
            if not self.pays:
                self.rounds_without += 1
                return min(PROBES, load.requests) if self.rounds_without % self.retry_every == 0 else 0
        self.rounds_without = 0
        return load.requests

    def expected_rate(self, load: Load) -> float:
        """Tokens a second over rounds like the past ones, each with its best budget."""
        values = self.history.samples_of(load.requests)  # [S, n]
        tau = load.requests + np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)  # [S, n + 1]
        batch = load.requests + load.other_tokens + np.arange(tau.shape[1])
        seconds = decode_seconds(self.costs, load, batch, load.requests)
        best = (tau / seconds).argmax(1)
        return float(tau[np.arange(len(tau)), best].sum() / seconds[best].sum())

    def choose(self, confidence: Tensor, lengths: Tensor, load: Load) -> Tensor:
        today = survival(confidence, lengths)  # [R, G]
        order = walk(today, lengths)
        verify_lengths = order.lengths(self.count(today, order, lengths, load), len(lengths))
        self.remember(today, order, lengths)  # after the choice: it must not see today
        return verify_lengths

    def count(self, today: Floats, order: Walk, lengths: Tensor, load: Load) -> int:
        """How many slots of the walk are verified."""
        raise NotImplementedError

    def remember(self, today: Floats, order: Walk, lengths: Tensor) -> None:
        self.history.observe(today, lengths)


class ThroughputGreedy(_CostBased):
    """DSpark, Algorithm 1. The stop at the first slot that does not raise the rate is what makes it lossless."""

    def count(self, today: Floats, order: Walk, lengths: Tensor, load: Load) -> int:
        return algorithm_1(order.survival, self.costs, load)


class StaleBudget(_CostBased):
    """DSpark, section 5.2: the best budget for the survivals of two drafted rounds ago, filled with today's tokens.

    Until there are two past rounds it is Algorithm 1.
    """

    def __init__(self, costs: CostTable, decay: float = 0.98, warm_up: int = 16, retry_every: int = 64):
        super().__init__(costs, decay, warm_up, retry_every)
        self.past: tuple[Floats, ...] = ()  # survivals of the last two rounds, as walked, the latest first

    def count(self, today: Floats, order: Walk, lengths: Tensor, load: Load) -> int:
        if len(self.past) < 2:
            return algorithm_1(order.survival, self.costs, load)
        return best_budget(self.past[1], self.costs, load)

    def remember(self, today: Floats, order: Walk, lengths: Tensor) -> None:
        super().remember(today, order, lengths)
        self.past = (order.survival, *self.past)[:2]


class Foresight(_CostBased):
    """Ours: the best budget for *predicted* survivals, so that it sees past a dent in the cost curve.

    A request's first survival depends on no draft token: today's is used. Those after it are predicted from it by
    the running means of past rounds. The budget is then filled with today's tokens by `foresight`.
    Before there was any round it is Algorithm 1.
    """

    def count(self, today: Floats, order: Walk, lengths: Tensor, load: Load) -> int:
        budget = 0
        if self.history.samples:
            predicted = walk(self.history.predict(today[:, 0]), lengths).survival
            budget = best_budget(predicted, self.costs, load)
        return foresight(order.survival, budget, self.costs, load)
