"""Prefix schedulers: what they choose, by hand and by property. That no choice changes an output's law is proved in
test_schedulers_lossless.py.

Shapes: R requests, G slots.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import (
    FixedLength,
    Foresight,
    PrefixScheduler,
    StaleBudget,
    Threshold,
    ThroughputGreedy,
)
from dspark.spec.survivals import Floats, Ints, Survivals
from dspark.spec.walk import Drafted, Load, algorithm_1, best_budget, foresight, rates, survival, walk


def cost_table(target_seconds: list[float], draft_seconds: float = 1e-9, step_seconds: float = 0.0) -> CostTable:
    sizes = tuple(range(1, len(target_seconds) + 1))
    return CostTable("m", "fp32", "here", sizes, tuple(target_seconds), (1,), (draft_seconds,), step_seconds)


FLAT = cost_table([1.0, 1.0])
# Two tokens cost as much as eight: the first draft token pays only together with later ones.
STEP = cost_table([1.0] + [2.0] * 7 + [4.0] * 8)

MAKE: dict[str, Callable[[CostTable], PrefixScheduler]] = {
    "fixed": lambda costs: FixedLength(2),
    "threshold": lambda costs: Threshold(0.3),
    "greedy": ThroughputGreedy,
    "stale": StaleBudget,
    "foresight": Foresight,
}


def load(requests: int, other_tokens: int = 0) -> Load:
    return Load(tuple(range(requests)), other_tokens)


def choose(scheduler: PrefixScheduler, confidence: list[list[float]], lengths: list[int] | None = None) -> list[int]:
    numbers = np.array(confidence, dtype=np.float64)
    drafted = np.array(lengths if lengths is not None else [numbers.shape[1]] * len(numbers))
    return scheduler.choose(numbers, drafted, load(len(confidence))).tolist()


# ---- by hand


def test_survival_of_anything() -> None:
    confidence = np.array([[0.5, 0.5, 0.5], [math.nan, 1, 1], [math.inf, 2.0, -math.inf], [1.0, math.nan, 1.0]])
    values = survival(confidence, np.array([2, 3, 3, 3]))
    assert values.tolist() == [[0.5, 0.25, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_fixed_length() -> None:
    assert choose(FixedLength(2), [[0.1] * 3] * 2, [3, 1]) == [2, 1]
    assert FixedLength(1).to_draft(load(3)) == [0, 1, 2] and FixedLength(0).to_draft(load(3)) == []
    with pytest.raises(ValueError, match="cannot be negative"):
        FixedLength(-1)


def test_threshold_is_on_survival() -> None:
    assert choose(Threshold(0.5), [[0.9, 0.6, 0.9], [0.5, 0.9, 1.0], [1, 1, 1]], [3, 3, 2]) == [2, 1, 2]
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            Threshold(wrong)


def test_walk_breaks_ties_by_request_and_position() -> None:
    values = np.array([[0.5, 0.5, 0.25], [0.5, 0.25, 0.25], [0.9, 0.0, 0.0]])
    order = walk(values, np.array([3, 3, 1]))
    assert order.request.tolist() == [2, 0, 0, 1, 0, 1, 1]
    assert order.survival.tolist() == [0.9, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert order.lengths(4, 3).tolist() == [2, 1, 1]


def test_rates_count_drafting_and_not_what_prompts_add() -> None:
    costs = cost_table([1.0, 2.0, 5.0], draft_seconds=0.5, step_seconds=0.25)
    np.testing.assert_allclose(rates(np.array([0.8]), costs, load(1), Drafted(1, 3)), [1 / 1.75, 1.8 / 2.75])
    np.testing.assert_allclose(rates(np.array([0.8]), costs, load(1, 1), Drafted(1, 3)), [1 / 1.75, 1.8 / 4.75])


def test_algorithm_1_stops_at_the_first_slot_that_does_not_pay() -> None:
    costs = cost_table([1.0, 1.4, 2.2, 2.2])
    assert algorithm_1(np.array([0.9, 0.9, 0.9]), costs, load(1), Drafted(1, 3)) == 1
    assert best_budget(np.array([0.9, 0.9, 0.9]), costs, load(1), Drafted(1, 3)) == 3
    assert algorithm_1(np.array([0.0, 0.0]), FLAT, load(1), Drafted(1, 3)) == 0  # equal does not raise
    assert algorithm_1(np.array([]), costs, load(2), Drafted(2, 3)) == 0


def test_greedy_gives_slots_to_the_surest_requests() -> None:
    costs = cost_table([1.0, 1.0, 1.0, 1.0, 9.0])  # two slots besides the two anchors
    assert choose(ThroughputGreedy(costs), [[0.9, 0.8], [0.6, 0.9]]) == [2, 0]
    assert choose(ThroughputGreedy(costs), [[0.9, 0.5], [0.6, 0.9]]) == [1, 1]


def test_stale_budget_is_two_rounds_old() -> None:
    costs = cost_table([1.0, 1.4, 1.8, 2.2])
    scheduler = StaleBudget(costs)
    sure, hopeless = [[1.0, 1.0, 1.0]], [[0.1, 0.1, 0.1]]
    assert choose(scheduler, sure) == [3]  # no history: Algorithm 1
    assert choose(scheduler, hopeless) == [0]
    assert choose(scheduler, hopeless) == [3]
    assert choose(scheduler, sure) == [0]


def test_foresight_budget_comes_from_the_past() -> None:
    scheduler = Foresight(STEP)
    sure = [[0.9] * 7]
    assert choose(scheduler, sure) == [0]  # Algorithm 1: one token alone does not pay
    assert choose(scheduler, sure) == [7]
    assert choose(scheduler, [[0.1] + [0.9] * 6]) == [0]  # the first slot's own confidence counts


def test_foresight_stops_where_nothing_can_be_gained() -> None:
    """Its budget is 7, but after the second token no continuation pays: Algorithm 1's stop, without its blindness."""
    values = np.array([0.9, 0.8, 0.01, 0.01, 0.01, 0.01, 0.01])
    rising = cost_table([1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8, 3.1])
    assert foresight(values, 7, rising, load(1), Drafted(1, 7)) == 2
    assert (
        foresight(values, 0, rising, load(1), Drafted(1, 7)) == algorithm_1(values, rising, load(1), Drafted(1, 3)) == 2
    )
    assert foresight(values, 7, FLAT, load(1), Drafted(1, 7)) == 7  # free tokens always pay


def test_slots_that_are_not_drafted_for_long_are_still_known() -> None:
    history, falling = Survivals(), np.array([0.9**k for k in range(1, 9)])
    for slots in (8, 2):
        for _ in range(20_000):
            history.observe(falling[None, :slots], np.array([slots]), [7])
    np.testing.assert_allclose(history.means, falling, rtol=1e-6)
    np.testing.assert_allclose(history.recent, np.tile(falling, (128, 1)), rtol=1e-6)


def test_running_means() -> None:
    history = Survivals(decay=0.5)
    assert history.samples == 0
    history.observe(np.array([[0.8, 0.4], [0.4, 0.0]]), np.array([2, 1]), [7, 8])
    np.testing.assert_allclose(history.means, [0.6, 0.4])
    history.observe(np.array([[0.9, 0.2]]), np.array([2]), [7])
    history.settle()
    np.testing.assert_allclose(history.means, [(0.6 + 0.9) / 2, (0.2 + 0.2) / 1.5])
    ratio = history.means[1] / history.means[0]
    np.testing.assert_allclose(history.predict(np.array([1.0, 0.5])), [[1, ratio], [0.5, 0.5 * ratio]])


# ---- whether to draft


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_drafting_stops_where_it_does_not_pay(make: Callable[..., PrefixScheduler]) -> None:
    """Tried again, so that it may recover: after 10 rounds, then after twice as many each time; but never so
    often that the drafts are expected to lose more than a 512th of the time."""
    cheap, dear = cost_table([1.0, 3.0, 5.0], draft_seconds=0.01), cost_table([1.0, 1.0, 1.0], draft_seconds=1.0)
    lost = math.ceil(512 * (1 - (1 + 0.2 + 0.04) / 2))
    for costs, confidence, gaps in ((cheap, 0.2, [10, 20, 40, 80]), (dear, 0.2, [lost] * 2), (dear, 0.9, [1] * 596)):
        scheduler = make(costs, warm_up=4, retry_every=10)
        decisions = []
        for _ in range(600):
            decisions.append(bool(scheduler.to_draft(load(1))))
            if decisions[-1]:
                choose(scheduler, [[confidence] * 2])
        assert all(decisions[:4])
        assert np.diff(np.flatnonzero(decisions[3:])).tolist()[: len(gaps)] == gaps


@pytest.mark.parametrize("confidence", [0.02, 0.9])
def test_loads_that_come_back_are_not_asked_anew(confidence: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request more or less, again and again: one question for each number until its answer is due."""
    scheduler, asked = ThroughputGreedy(cost_table([1.0] * 9, draft_seconds=0.09), warm_up=1, retry_every=50), []
    how_many = scheduler.how_many
    monkeypatch.setattr(scheduler, "how_many", lambda step: asked.append(step.requests) or how_many(step))
    choose(scheduler, [[confidence] * 2])
    for i in range(45):
        scheduler.to_draft(load(7 + i % 2))
    assert asked == [7, 8]
    for i in range(30):
        if len(drafted := scheduler.to_draft(load(7 + i % 2))):
            choose(scheduler, [[confidence] * 2] * len(drafted))
    assert asked == [7, 8, 7, 8]


def test_load_decides_whether_drafting_pays() -> None:
    costs = cost_table([1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], draft_seconds=0.2)
    scheduler = Foresight(costs, warm_up=1)
    choose(scheduler, [[0.9, 0.9]])
    assert scheduler.to_draft(load(1)) == [0]
    assert scheduler.to_draft(load(8)) == []
    assert scheduler.to_draft(load(1, other_tokens=1)) == [0]
    # Prompts make the step long, 1.9 / 6.2 against 1 / 5; but they cost that anyway, and a slot adds 1 second.
    assert scheduler.to_draft(load(1, other_tokens=7)) == []


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_drafts_for_the_requests_whose_drafts_survive(make: Callable[..., PrefixScheduler]) -> None:
    """Drafting for one costs a tenth of a step, verifying a token two: it pays for sure drafts only."""
    costs = CostTable("m", "fp32", "here", (1, 100), (1.0, 20.8), (1, 100), (0.1, 10.0), 3.0)
    scheduler, requests, drafted = make(costs, warm_up=1), tuple(range(10)), []
    for _ in range(40):
        drafted = scheduler.to_draft(Load(requests))
        lengths = np.zeros(10, np.int64)
        lengths[drafted] = 2
        confidence = np.array([[0.95, 0.9] if i in (3, 8) else [0.2, 0.1] for i in requests])
        scheduler.choose(confidence, lengths, Load(requests))
    assert drafted == [3, 8]
    # A request that nothing is known of is tried once, beside those that pay.
    assert scheduler.to_draft(Load((3, 8, 1, 2, 4, 5, 6, 7, 9, 77))) == [0, 1, 9]


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_drafts_as_many_slots_as_pay(make: Callable[..., PrefixScheduler]) -> None:
    """A slot costs as much as half a step: short blocks pay where later slots hardly survive, whole ones elsewhere."""
    costs = replace(
        cost_table([1.0] * 9, draft_seconds=4.1), slots=8, short_slots=2, short_draft_seconds=(1.1,), requests=(1,)
    )
    for confidence, slots in (([0.9] * 2 + [0.1] * 6, 2), ([1.0] * 8, 8)):
        scheduler = make(costs, warm_up=1, retry_every=4)
        drafted = []
        for _ in range(22):
            assert scheduler.to_draft(load(1)) == [0]
            drafted.append(min(8, scheduler.slots_to_draft(load(1))))
            choose(scheduler, [confidence[: drafted[-1]]])
        assert drafted == [8, *[slots, slots, 8] * 7]  # whole ones before it asks again
    assert FixedLength(3).slots_to_draft(load(5)) == 3 and Threshold(0.5).slots_to_draft(load(5)) > 1000


def test_a_request_s_own_level() -> None:
    history = Survivals()
    for _ in range(50):
        history.observe(np.array([[0.9, 0.9], [0.1, 0.1]]), np.array([2, 2]), [1, 2])
    levels, idle = history.levels([1, 2, 3])
    assert levels[0] > 1.6 and levels[1] < 0.4 and levels[2] == pytest.approx(1.0)
    assert idle[0] == idle[1] == 0 and idle[2] > 1000
    assert history.levels([2, 77, 1])[0].tolist() == [levels[1], levels[2], levels[0]]
    rounds = history.rounds_like([1, 2, 3])
    assert rounds.shape == (42, 3, 2)
    assert rounds[:, 0].mean() > 0.8 and rounds[:, 1].mean() < 0.2 and rounds[:, 2].mean() == pytest.approx(0.5)
    for _ in range(30):  # chosen for surviving well, request 1 does not stand for others
        history.observe(np.array([[0.9, 0.9], [0.0, 0.0]]), np.array([2, 0]), [1, 2])
    levels, idle = history.levels([1, 2, 4])
    assert levels[2] == pytest.approx(1.0) and idle[:2].tolist() == [0, 30]


def test_what_ended_is_forgotten() -> None:
    history = Survivals()
    for i in range(500):
        history.observe(np.array([[0.5]]), np.array([1]), [i])
    assert len(history.own) <= 3


# ---- properties


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Floats, Ints, CostTable, np.random.Generator]:
    """Confidence [R, G], with ties, zeros and NaN; draft lengths; a jagged cost table; randomness to spend."""
    requests, slots = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    value = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0, math.nan]) | st.floats(0, 1)
    confidence = [[draw(value) for _ in range(slots)] for _ in range(requests)]
    lengths = [draw(st.integers(0, slots)) for _ in range(requests)]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    jumps = generator.random(30) * (generator.random(30) < draw(st.sampled_from([0.1, 0.3, 1.0])))
    costs = cost_table((1 + np.cumsum(jumps)).tolist(), 0.01)
    return np.array(confidence, dtype=np.float64), np.array(lengths), costs, generator


def lived(name: str, costs: CostTable, slots: int, generator: np.random.Generator) -> PrefixScheduler:
    """A scheduler that has seen three rounds."""
    scheduler = MAKE[name](costs)
    for _ in range(3):
        requests = int(generator.integers(1, 5))
        confidence = generator.random((requests, slots)) ** 0.3
        scheduler.choose(confidence, np.full(requests, slots), load(requests))
    return scheduler


@pytest.mark.parametrize("name", MAKE)
@settings(deadline=None)
@given(rounds())
def test_what_lies_past_the_stop_never_matters(
    name: str, arguments: tuple[Floats, Ints, CostTable, np.random.Generator]
) -> None:
    """Lengths are in range, and slots after the first unverified one may hold anything: the choice is the same."""
    confidence, lengths, costs, generator = arguments
    scheduler = lived(name, costs, confidence.shape[1], generator)
    step = load(len(lengths), int(generator.integers(0, 3)))
    chosen = deepcopy(scheduler).choose(confidence, lengths, step)
    assert chosen.dtype == np.int64 and chosen.shape == lengths.shape
    assert bool(((chosen >= 0) & (chosen <= lengths)).all())
    unseen = np.arange(confidence.shape[1]) > chosen[:, None]
    other = np.where(unseen, generator.random(confidence.shape), confidence)
    assert deepcopy(scheduler).choose(other, lengths, step).tolist() == chosen.tolist()


@pytest.mark.parametrize("name", MAKE)
@settings(deadline=None)
@given(rounds())
def test_requests_are_equal(name: str, arguments: tuple[Floats, Ints, CostTable, np.random.Generator]) -> None:
    """Without ties, a permutation of the requests permutes the lengths and does nothing else."""
    _, lengths, costs, generator = arguments
    confidence = generator.random((len(lengths), 3))
    lengths = np.minimum(lengths, 3)
    permutation = generator.permutation(len(lengths))
    scheduler, step = lived(name, costs, 3, generator), load(len(lengths))
    chosen = deepcopy(scheduler).choose(confidence, lengths, step)
    permuted = deepcopy(scheduler).choose(confidence[permutation], lengths[permutation], step)
    assert permuted.tolist() == chosen[permutation].tolist()


@settings(deadline=None)
@given(rounds())
def test_foresight_is_the_plain_loop(arguments: tuple[Floats, Ints, CostTable, np.random.Generator]) -> None:
    """The vectorised bound against every continuation, one by one."""
    confidence, lengths, costs, generator = arguments
    step = load(len(lengths), int(generator.integers(0, 3)))
    values = walk(survival(confidence, lengths), lengths).survival
    budget = int(generator.integers(0, len(values) + 2))
    base, tau, count = step.requests + step.other_tokens, float(step.requests), 0

    def rate(expected: float, slots: int) -> float:
        prompts = costs.target(base, step.requests) - costs.target(step.requests, step.requests)
        return expected / float(costs.seconds(base + slots, step.requests, step.requests) - prompts)

    for i, value in enumerate(values):
        furthest = len(values) - i if i < budget else 1
        best = max(rate(tau + m * value, i + m) for m in range(1, furthest + 1))
        if best <= rate(tau, i) * (1 + 1e-12):
            break
        tau, count = tau + value, i + 1
    found = foresight(values, budget, costs, step, Drafted(step.requests, confidence.shape[1]))
    if found != count:  # only where a continuation is exactly as good, up to rounding
        i = min(found, count)
        tau = step.requests + values[:i].sum()
        furthest = len(values) - i if i < budget else 1
        best = max(rate(tau + m * values[i], i + m) for m in range(1, furthest + 1))
        assert best == pytest.approx(rate(tau, i), rel=1e-9)


def test_foresight_beats_algorithm_1_on_a_jagged_curve() -> None:
    """Expected tokens a second over random rounds, where each survival is the truth."""
    # Matrix products come in tiles of 8 rows: the time jumps there and is nearly flat between.
    costs = cost_table([1 + 0.5 * math.ceil(b / 8) + 0.002 * b for b in range(1, 200)], draft_seconds=0.05)
    for requests in (1, 3, 8, 24):
        speed = {}
        for make in (ThroughputGreedy, Foresight):
            generator = np.random.default_rng(requests)
            scheduler, tokens, seconds = make(costs), 0.0, 0.0
            for _ in range(300):
                confidence = generator.beta(4, 1.5, (requests, 7))
                lengths = np.full(requests, 7)
                chosen = scheduler.choose(confidence, lengths, load(requests))
                kept = np.arange(7) < chosen[:, None]
                tokens += requests + float((survival(confidence, lengths) * kept).sum())
                seconds += float(costs.seconds(requests + int(chosen.sum()), requests, requests))
            speed[make.__name__] = tokens / seconds
        assert speed["Foresight"] >= 0.999 * speed["ThroughputGreedy"]
        if requests in (8, 24):  # where the anchors alone fill whole tiles, Algorithm 1 never enters the next
            assert speed["Foresight"] > 1.05 * speed["ThroughputGreedy"]


def test_a_hard_block_does_not_end_drafting_for_good() -> None:
    """Whether drafting pays was once asked of one past block alone: after a hard one nothing was drafted any more."""
    costs = cost_table([1.0, 1.1, 1.2, 1.3], draft_seconds=0.1)
    scheduler = Foresight(costs, warm_up=4)
    drafted = 0
    for i in range(300):
        if scheduler.to_draft(load(1)):
            drafted += 1
            choose(scheduler, [[0.05, 0.05] if i % 4 == 0 else [0.9, 0.8]])
    assert drafted == 300


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_a_no_for_hard_requests_does_not_hold_for_others(make: Callable[..., PrefixScheduler]) -> None:
    """A stream's requests one after the other; the hard one comes after easy ones."""
    scheduler = make(cost_table([1.0, 1.6, 2.2, 2.8], draft_seconds=0.2), warm_up=1)

    def drafted(request: int, confidence: float, rounds: int) -> list[bool]:
        decisions = []
        for _ in range(rounds):
            decisions.append(bool(scheduler.to_draft(Load((request,)))))
            if decisions[-1]:
                scheduler.choose(np.full((1, 2), confidence), np.array([2]), Load((request,)))
        return decisions

    assert all(drafted(0, 0.95, 80))
    assert sum(drafted(1, 0.01, 80)[40:]) <= 1  # it may be asked again
    assert all(drafted(2, 0.95, 40))
