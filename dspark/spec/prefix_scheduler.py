"""Prefix scheduling: how many draft tokens of each request the target verifies this round (design §5).

**Lossless** means: whether a draft token is verified may depend on past rounds, on the tokens before it in its own
request, and on tokens of other requests that are verified anyway; never on itself or on a token after it. All
schedulers below keep to that in one way: they *walk* the slots of all requests in descending survival and stop
somewhere. Survival never rises along a request and ties go by (request, position), so the next slot of the walk is
always the first unverified one of its request, and its survival depends on verified tokens only. What is left to
show for each is that the decision to stop looks no further. docs/losslessness.md goes through them one by one.

Shapes: R requests, G slots, n = slots with a draft token of all requests together.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from dspark.spec.cost_table import CostTable
from dspark.spec.live_costs import LiveCosts, StepTaken
from dspark.spec.survivals import Floats, Ints, Survivals
from dspark.spec.walk import Drafted, Load, Walk, algorithm_1, best_budget, foresight, step_seconds, survival, walk

PATIENCE = 8  # how many times `retry_every` rounds a "no" holds at most, twice as long each time in a row
OFTEN = 16  # rounds for each request that an answer holds, if that is less than `retry_every`; a "no" often longer
OTHER_LOAD = 1 / 8  # change of the number of requests that is a load of its own
PAYS = 1.05  # times plain decoding that drafting must promise: a promise is kept to within a few percent
SHARES = 8  # parts of the running requests that drafting may be tried for
LENGTHS = 4  # parts of a block that may be drafted alone
WHOLE = 1 << 16  # slots, more than any block has
PROBES = 2  # requests drafted for, now and then, while drafting does not pay; their contexts are taken in first
NEWS = 1 / 512  # of the time is what those drafts may lose


class PrefixScheduler(ABC):
    """Chooses verify lengths, once a round and in the order of rounds: it may remember what it saw."""

    def to_draft(self, load: Load) -> list[int]:
        """For which of the load's requests to draft this round, by index, ascending; asked before drafting."""
        return list(range(load.requests))

    def slots_to_draft(self, load: Load) -> int:
        """How long blocks are to be, if the drafter can make them so long; asked after `to_draft` named some."""
        return WHOLE

    @abstractmethod
    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        """Verify lengths [R] from confidence [R, G] and draft lengths [R], which they never exceed.

        A request that nothing was drafted for has draft length 0.
        Slots at and past a request's length are padding; confidence may be anything, NaN too.
        """

    def observe(self, step: StepTaken) -> None:  # noqa: B027  most learn nothing from it
        """What a step without prompts took, after it."""


@dataclass(frozen=True)
class FixedLength(PrefixScheduler):
    """Verify the first `length` slots of every request, whatever the load; the baseline."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"a verify length cannot be negative: {self.length}")

    def to_draft(self, load: Load) -> list[int]:
        return super().to_draft(load) if self.length else []

    def slots_to_draft(self, load: Load) -> int:
        return self.length

    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        return np.minimum(lengths, self.length)


@dataclass(frozen=True)
class Threshold(PrefixScheduler):
    """Verify the slots whose survival is at least `threshold`, whatever the load."""

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, got {self.threshold}")

    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        return (survival(confidence, lengths) >= self.threshold).sum(1)


@dataclass
class _Answer:
    """For how many of the requests drafting pays, 0: for none, and blocks of how many slots; asked again `interval`
    rounds later, in round `due`."""

    ids: frozenset[int]  # of the requests it was asked for
    paying: int
    slots: int
    interval: int
    due: int
    tried: bool = False  # where it pays for none: some were drafted for, so that there is news to ask by
    beside: dict[int, bool] = field(default_factory=dict)  # whether it pays beside prompts, by the logarithm of tokens


class _CostBased(PrefixScheduler):
    """The frame of the three below: for whom to draft, the walk, what is remembered after the choice."""

    def __init__(self, profile: CostTable, decay: float = 0.98, warm_up: int = 16, retry_every: int = 64):
        """Drafts until about `warm_up` requests were seen; an answer to "for how many does it pay" holds for
        `retry_every` rounds at most, and longer where it was "for none" again and again or news is dear."""
        self.live = LiveCosts(profile)
        self.warm_up, self.retry_every = warm_up, retry_every
        self.history = Survivals(decay)
        self.rounds = 0  # since the warm-up
        self.answers: dict[int, _Answer] = {}  # by load, see `answer`
        self.slots = WHOLE  # of this round's blocks

    @property
    def costs(self) -> CostTable:
        """The profile, brought to what steps take."""
        return self.live.table

    def to_draft(self, load: Load) -> list[int]:
        """Those whose drafts survive best, as many as past rounds say give most tokens a second; often all or none.

        Where none, a few before the question is asked again; where some, a few of which nothing was heard for long.
        Blocks are as long as pays, but whole where there is to be news of all slots: before it is asked again.
        """
        count, self.slots = load.requests, WHOLE
        if self.history.samples < self.warm_up:
            return list(range(count))
        self.rounds += 1
        answer = self.answer(load)
        if not answer.paying:
            if self.rounds < answer.due:
                return []
            answer.tried = True
            return sorted(best_first(self.history.levels(load.ids)[1])[:PROBES].tolist())
        if load.other_tokens and not self.pays(load, answer):
            return []
        if self.rounds + 1 < answer.due:
            self.slots = answer.slots
        if answer.paying == len(answer.ids) or answer.paying >= count:
            return list(range(count))
        levels, idle = self.history.levels(load.ids)
        unknown = np.flatnonzero(idle >= self.retry_every)[:PROBES]
        return sorted({*best_first(levels)[: answer.paying].tolist(), *unknown.tolist()})

    def slots_to_draft(self, load: Load) -> int:
        return self.slots

    def answer(self, load: Load) -> _Answer:
        """For how many drafting pays at a load like this one, asked anew when that is due."""
        like = round(math.log(load.requests) / OTHER_LOAD)
        known = self.answers.get(like)
        due = known is not None and self.rounds >= known.due and (known.paying or known.tried)
        # A "no" is of requests that are hard to draft for: it does not hold for others.
        others = known is not None and not known.paying and len(known.ids & set(load.ids)) <= load.requests / 2
        if known is None or due or others:
            paying, slots = self.how_many(load)
            interval = min(self.retry_every, OFTEN * load.requests)  # for few it is news of these, not of all there are
            if not paying:
                interval = max(interval, self.rounds_between_probes(load))
                if known is not None and not known.paying and not others:
                    interval = max(interval, min(2 * known.interval, PATIENCE * self.retry_every))
            known = self.answers[like] = _Answer(
                frozenset(load.ids), paying, slots, interval, due=self.rounds + interval - 1
            )
        return known

    def rounds_between_probes(self, load: Load) -> int:
        """How many plain rounds make what drafting for a few is expected to lose no more than `NEWS` of the time."""
        probes = Drafted(min(PROBES, load.requests), self.history.slots)
        return math.ceil(max(0.0, 1 - self.gains(Load(load.ids), [probes])[0]) / NEWS)

    def how_many(self, load: Load) -> tuple[int, int]:
        """For how many of the requests, the best first, to draft in a step without prompts, 0 where it does not pay;
        and how many slots."""
        counts, lengths = parts(load.requests, SHARES), parts(self.history.slots, LENGTHS)
        choices = [Drafted(n, g) for g in reversed(lengths) for n in counts]
        gains = self.gains(Load(load.ids), choices)
        best, slots = choices[int(gains.argmax())]
        return best if gains.max() > PAYS else 0, slots

    def pays(self, load: Load, answer: _Answer) -> bool:
        """Whether it pays beside the prompts of this step too: they take the cost curve to where it may be steeper."""
        like = round(2 * math.log(load.other_tokens))
        if like not in answer.beside:
            choice = Drafted(min(answer.paying, load.requests), answer.slots)
            answer.beside[like] = bool(self.gains(load, [choice])[0] > PAYS)
        return answer.beside[like]

    def gains(self, load: Load, choices: list[Drafted]) -> Floats:
        """Tokens a second, times those of plain decoding, in rounds like the past ones, each with its best budget, for
        each way to draft: for so many of the requests, the best first, so many slots."""
        rounds = self.history.rounds_like(load.ids)[:, best_first(self.history.levels(load.ids)[0])]
        slots = rounds.shape[2]
        values = rounds.reshape(len(rounds), -1)  # [rounds, n]
        order = np.argsort(-values, axis=1)
        requests_drafted, slots_drafted = np.array(choices).T[..., None, None]  # [choices, 1, 1]
        drafted = (order // slots < requests_drafted) & (order % slots < slots_drafted)  # [choices, rounds, n]
        tau = np.full((*drafted.shape[:2], values.shape[1] + 1), float(load.requests))
        tau[..., 1:] += np.cumsum(np.take_along_axis(values, order, 1) * drafted, -1)
        tokens = np.zeros(tau.shape, np.int64)
        np.cumsum(drafted, -1, out=tokens[..., 1:])
        seconds = step_seconds(self.costs, load.requests, load.other_tokens, 0, 0, values.shape[1])[tokens]
        seconds += self.costs.draft(requests_drafted, slots_drafted)
        best = (tau / seconds).argmax(-1)[..., None]
        tau, seconds = (np.take_along_axis(of_step, best, -1).sum((1, 2)) for of_step in (tau, seconds))
        return tau / seconds * float(self.costs.seconds(load.requests, load.requests)) / load.requests

    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        today = survival(confidence, lengths)  # [R, G]
        order = walk(today, lengths)
        drafted = Drafted(int(np.count_nonzero(lengths)), confidence.shape[1])
        verify_lengths = order.lengths(self.count(today, order, lengths, load, drafted), len(lengths))
        self.history.observe(today, lengths, load.ids)  # after the choice: it must not see today
        return verify_lengths

    @abstractmethod
    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        """How many slots of the walk are verified."""

    def observe(self, step: StepTaken) -> None:
        self.live.observe(step)


def best_first(levels: Floats | Ints) -> Ints:
    return np.argsort(-levels, kind="stable")


def parts(whole: int, count: int) -> list[int]:
    """1/count, 2/count, ... of it, rounded up, each once."""
    return sorted({-(-whole * part // count) for part in range(1, count + 1)})


class ThroughputGreedy(_CostBased):
    """DSpark, Algorithm 1. The stop at the first slot that does not raise the rate is what makes it lossless."""

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        return algorithm_1(order.survival, self.costs, load, drafted)


class StaleBudget(_CostBased):
    """DSpark, section 5.2: the best budget for the survivals of two drafted rounds ago, filled with today's tokens.

    Until there are two past rounds it is Algorithm 1.
    """

    past: tuple[Floats, ...] = ()  # survivals of the last two rounds, as walked, the latest first

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        if len(self.past) < 2:
            count = algorithm_1(order.survival, self.costs, load, drafted)
        else:
            count = best_budget(self.past[1], self.costs, load, drafted)
        self.past = (order.survival, *self.past)[:2]
        return count


class Foresight(_CostBased):
    """Ours: the best budget for *predicted* survivals, so that it sees past a dent in the cost curve.

    A request's first survival depends on no draft token: today's is used. Those after it are predicted from it by
    the running means of past rounds. The budget is then filled with today's tokens by `foresight`.
    Before there was any round it is Algorithm 1.
    """

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        budget = 0
        if self.history.samples:
            predicted = walk(self.history.predict(today[:, 0]), lengths).survival
            budget = best_budget(predicted, self.costs, load, drafted)
        return foresight(order.survival, budget, self.costs, load, drafted)
