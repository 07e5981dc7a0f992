"""Every prefix scheduler leaves the output's law as it is: proved by exact enumeration, on the real classes.

Confidences depend on the drafted tokens, cost tables are jagged, and requests are decoded together. Schedulers that
look one token too far must fail the same comparison.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dspark.spec.calibration import Calibration, OnlineCalibration
from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import (
    FixedLength,
    Foresight,
    PrefixScheduler,
    StaleBudget,
    Threshold,
    ThroughputGreedy,
)
from dspark.spec.survivals import Floats, Ints
from dspark.spec.walk import Drafted, Load, Walk, best_budget, foresight, survival, walk
from tests.spec.exact import (
    Request,
    Tokens,
    certain_drafter,
    joint_law,
    random_confidence,
    random_drafter,
    random_target,
    scheduled,
    target_law,
    total_variation,
)


def cost_table(target_seconds: tuple[float, ...], draft_seconds: float = 1e-3, step_seconds: float = 0.0) -> CostTable:
    sizes = tuple(range(1, len(target_seconds) + 1))
    drafts = (draft_seconds,) * 2, step_seconds, 0.0, 3, 1, (0.3 * draft_seconds,) * 2  # shorter blocks cost less
    return CostTable("m", "fp64", "here", sizes, target_seconds, (1, 2), *drafts)


def jagged_costs(seed: int) -> CostTable:
    """Flat stretches and jumps, so that the best number of slots often lies behind a worse one."""
    generator = np.random.default_rng([seed, 4])
    jumps = generator.random(9) * 0.5 * (generator.random(9) < 0.3)
    seconds = tuple((1 + np.cumsum(jumps)).tolist())
    return cost_table(seconds, generator.random() * 0.1, generator.random() * 0.1)


SEEDS = (2, 5, 8, 15)  # of tables and requests on which every wrong scheduler below is caught


# Short memories, so that a few rounds show everything: two requests end the warm-up, every 2nd round is a retry.
MAKE: dict[str, Callable[[CostTable], PrefixScheduler]] = {
    "fixed 0": lambda costs: FixedLength(0),
    "fixed 1": lambda costs: FixedLength(1),
    "fixed 9": lambda costs: FixedLength(9),
    "threshold": lambda costs: Threshold(0.3),
    "greedy": lambda costs: ThroughputGreedy(costs, warm_up=1, retry_every=2),
    "greedy, always drafting": lambda costs: ThroughputGreedy(costs),
    "stale": lambda costs: StaleBudget(costs, warm_up=1, retry_every=2),
    "stale, always drafting": lambda costs: StaleBudget(costs),
    "foresight": lambda costs: Foresight(costs, decay=0.5, warm_up=1, retry_every=2),
    "foresight, always drafting": lambda costs: Foresight(costs),
}


def requests(count: int, seed: int, vocab: int = 2) -> list[Request]:
    """One or two requests with confidences that depend on the tokens drafted before them."""
    return [
        Request(
            random_target(seed * 10 + r, vocab),
            random_drafter(seed * 10 + r, vocab),
            confidence=random_confidence(seed * 10 + r),
        )
        for r in range(count)
    ]


def distance(
    batch: list[Request], make: Callable[[], PrefixScheduler], gamma: int, num_tokens: int, other_tokens: int = 0
) -> float:
    choose = scheduled(make, other_tokens=other_tokens)
    law = joint_law(batch, gamma, choose, num_tokens, memory=num_tokens)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return total_variation(law, target_law(batch, num_tokens))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MAKE)
def test_one_request(name: str, seed: int) -> None:
    costs = jagged_costs(seed)
    assert distance(requests(1, seed, vocab=3), lambda: MAKE[name](costs), gamma=2, num_tokens=4) <= 1e-12
    assert distance(requests(1, seed), lambda: MAKE[name](costs), 3, num_tokens=4, other_tokens=seed % 3) <= 1e-12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MAKE)
def test_two_requests(name: str, seed: int) -> None:
    costs = jagged_costs(seed)
    assert distance(requests(2, seed), lambda: MAKE[name](costs), gamma=2, num_tokens=3) <= 1e-12


@pytest.mark.parametrize("name", ["greedy", "stale", "foresight"])
def test_two_requests_with_longer_blocks(name: str) -> None:
    costs = jagged_costs(7)
    assert distance(requests(2, 7), lambda: MAKE[name](costs), gamma=3, num_tokens=2) <= 1e-12


@pytest.mark.parametrize("name", ["greedy", "stale", "foresight"])
def test_ties_between_requests(name: str) -> None:
    """Confidences of only two values, 1 among them: nearly every comparison is a tie."""

    def coarse(seed: int) -> Callable[[Tokens, Tokens], float]:
        fine = random_confidence(seed)
        return lambda prefix, block: 1.0 if fine(prefix, block) > 0.4 else 0.5

    batch = [Request(random_target(r, 2), random_drafter(r, 2), confidence=coarse(r)) for r in (20, 21)]
    for seed in range(3):
        costs = jagged_costs(seed)
        assert distance(batch, lambda costs=costs: MAKE[name](costs), gamma=2, num_tokens=3) <= 1e-12


def test_a_drafter_without_randomness() -> None:
    batch = [Request(random_target(r, 2), certain_drafter(r, 2), confidence=random_confidence(r)) for r in (30, 31)]
    for seed in range(4):
        costs = jagged_costs(seed)
        assert distance(batch, lambda costs=costs: Foresight(costs, warm_up=1), gamma=2, num_tokens=3) <= 1e-12


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_online_calibration(make: Callable[[CostTable], PrefixScheduler]) -> None:
    """Its state holds what was accepted in past rounds; short memory, so that it moves confidence a lot."""

    def calibrator() -> OnlineCalibration:
        return OnlineCalibration(Calibration((0.7, 1.5)), decay=0.5, prior=0.2)

    for count, num_tokens in ((1, 4), (2, 3)):
        for seed in range(2):
            batch, costs = requests(count, seed), jagged_costs(seed)
            choose = scheduled(lambda costs=costs: make(costs), calibrator)
            law = joint_law(batch, 2, choose, num_tokens, memory=num_tokens, remember=lambda ended: ended)
            assert total_variation(law, target_law(batch, num_tokens)) <= 1e-12


# ---- Appendix A


class PastTheStop(ThroughputGreedy):
    """The wrong Algorithm 1: the best number of slots over all of today's survivals."""

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        return best_budget(order.survival, self.costs, load, drafted)


def test_appendix_a() -> None:
    """Searching past the stop gives token 0 probability 0.85 in place of 0.70.

    Target (0.7, 0.3), drafter (0.5, 0.5) in slot 1. Verifying one token costs as much as verifying two and does not
    pay by itself; two pay if the second is sure. The confidence of slot 2 depends on the token in slot 1: sure after
    token 0, hopeless after token 1. So a draft of token 0 is verified, and stays; a draft of token 1 is never
    verified, and the target draws anew: 0.5 + 0.5 · 0.7 = 0.85.
    """
    target_probs, draft_probs = (torch.tensor(p, dtype=torch.float64) for p in ((0.7, 0.3), (0.5, 0.5)))

    def confidence(prefix: Tokens, block: Tokens) -> float:
        if not block:
            return 0.75
        return 1.0 if block == (0,) else 0.0

    request = Request(
        lambda prefix: target_probs, lambda prefix, block: (torch.arange(2), draft_probs), None, confidence
    )
    costs = cost_table((1.0, 2.0, 2.0), draft_seconds=1e-9)

    def law(make: Callable[[CostTable], PrefixScheduler]) -> float:
        return joint_law([request], 2, scheduled(lambda: make(costs)), num_tokens=1)[((0,),)]

    assert law(PastTheStop) == pytest.approx(0.85, abs=1e-12)
    for make in (ThroughputGreedy, StaleBudget, Foresight):
        assert law(make) == pytest.approx(0.70, abs=1e-12)


# ---- wrong schedulers that must be caught


class FreshBudget(StaleBudget):
    """The budget from today's confidences instead of those of two rounds ago, once there is a past."""

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        known = order.survival if self.past else order.survival[:0]
        self.past = (order.survival,)
        return best_budget(known, self.costs, load, drafted)


class SeesToday(Foresight):
    """Predicts with today's later confidences."""

    def count(self, today: Floats, order: Walk, lengths: Ints, load: Load, drafted: Drafted) -> int:
        return foresight(
            order.survival, best_budget(order.survival, self.costs, load, drafted), self.costs, load, drafted
        )


class RemembersTooEarly(Foresight):
    """Takes today's round into the running means before it chooses."""

    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        self.history.observe(survival(confidence, lengths), lengths, load.ids)
        order = walk(survival(confidence, lengths), lengths)
        return order.lengths(
            self.count(survival(confidence, lengths), order, lengths, load, Drafted(*confidence.shape)), len(lengths)
        )


class WholeBlocksFirst(ThroughputGreedy):
    """Serves the request whose whole block is likeliest to survive: its last confidence decides on its first slot."""

    def choose(self, confidence: Floats, lengths: Ints, load: Load) -> Ints:
        verify_lengths = np.zeros_like(lengths)
        verify_lengths[int(survival(confidence, lengths)[:, -1].argmax())] = 1
        return verify_lengths


@pytest.mark.parametrize("wrong", [PastTheStop, FreshBudget, SeesToday, RemembersTooEarly, WholeBlocksFirst])
def test_wrong_schedulers_are_caught(wrong: Callable[..., PrefixScheduler]) -> None:
    """On the very requests and cost tables of the proofs above."""
    distances = []
    for seed in SEEDS:
        costs = jagged_costs(seed)
        distances.append(distance(requests(2, seed), lambda costs=costs: wrong(costs), gamma=2, num_tokens=3))
    assert max(distances) > 1e-3
