"""Costs that follow what steps take: the factors are found, one odd step does little, schedulers go by them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.spec.cost_table import CostTable
from dspark.spec.live_costs import REFRESH, LiveCosts, StepTaken, at_present, scaled
from dspark.spec.prefix_scheduler import Foresight, StaleBudget, ThroughputGreedy
from dspark.spec.walk import Load

PROFILE = CostTable(
    "m",
    "bf16",
    "here",
    (1, 4, 8, 32),
    (10.0, 10.5, 12.0, 31.0),
    (1, 16),
    (2.0, 12.0),
    step_seconds=0.5,
    context_seconds=0.2,
    slots=8,
    short_slots=2,
    short_draft_seconds=(1.5, 4.0),
)
factor = st.floats(0.3, 3.0)


def step_of(costs: CostTable, requests: int, draft_tokens: int, slots: int) -> StepTaken:
    """What these costs say it takes."""
    tokens, drafted = requests + draft_tokens, requests if draft_tokens else 0
    draft = float(costs.draft(drafted, slots))
    return StepTaken(
        requests, tokens, drafted, slots, draft, costs.step_seconds + float(costs.target(tokens, requests))
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(wanted=st.tuples(factor, factor, factor, factor), seed=st.integers(0, 99))
def test_the_factors_of_what_steps_take_are_found(wanted: tuple[float, float, float, float], seed: int) -> None:
    rng, live, truth = np.random.default_rng(seed), LiveCosts(PROFILE), scaled(PROFILE, *wanted)
    for _ in range(600):
        requests, slots = int(rng.integers(1, 9)), int(rng.integers(2, 9))
        live.observe(step_of(truth, requests, int(rng.integers(0, slots * requests + 1)), slots))
    assert live.factors() == pytest.approx(wanted, rel=0.1, abs=0.1)
    found, expected = (c.seconds(np.arange(1, 40), 3, 3, 5) for c in (live.table, truth))
    np.testing.assert_allclose(found, expected, rtol=0.05)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(wanted=st.tuples(*4 * [st.floats(0.5, 2.0)]))
def test_a_few_sizes_measured_again_bring_a_profile_to_the_present(wanted: tuple[float, float, float, float]) -> None:
    truth = scaled(PROFILE, *wanted)
    seconds = {slots: float(truth.draft(1, slots)) for slots in (2, 8)}
    now = replace(
        truth,
        batch_tokens=(1, 16),
        target_seconds=tuple(float(truth.target(n, n)) for n in (1, 16)),
        requests=(1,),
        draft_seconds=(seconds[8],),
        short_draft_seconds=(seconds[2],),
    )
    found, expected = (c.seconds(np.arange(1, 40), 3, 3, 5) for c in (at_present(PROFILE, now), truth))
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_as_long_as_steps_take_what_was_expected_the_profile_stays() -> None:
    live = LiveCosts(PROFILE)
    for i in range(400):
        live.observe(step_of(PROFILE, 1 + i % 3, i % 5, 8))
    assert live.factors() == pytest.approx((1.0,) * 4)
    assert live.table.target_seconds == pytest.approx(PROFILE.target_seconds)


def test_plain_decoding_of_one_stream_tells_nothing_of_rows_and_drafts() -> None:
    live = LiveCosts(PROFILE)
    for _ in range(400):
        live.observe(step_of(scaled(PROFILE, 1.5, 1.0, 1.0, 1.0), 1, 0, 0))
    assert live.factors() == pytest.approx((1.5, 1.0, 1.0, 1.0), abs=0.01)


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_one_odd_step_does_little(seconds: float) -> None:
    live = LiveCosts(PROFILE)
    for i in range(400):
        live.observe(step_of(PROFILE, 1 + i % 3, i % 5, 8))
    live.observe(replace(step_of(PROFILE, 2, 4, 8), draft_seconds=seconds, other_seconds=seconds))
    assert live.factors() == pytest.approx((1.0,) * 4, abs=0.15)


def test_factors_stay_within_reason() -> None:
    live = LiveCosts(PROFILE)
    for i in range(400):
        live.observe(replace(step_of(PROFILE, 1 + i % 3, i % 5, 8), draft_seconds=1e9, other_seconds=0.0))
    assert all(0.1 < f < 9 for f in live.factors())
    assert all(0 < s < 1e3 for s in live.table.target_seconds)


@pytest.mark.parametrize("make", [ThroughputGreedy, StaleBudget, Foresight])
def test_schedulers_go_by_what_steps_take(make) -> None:
    """Drafting pays by the profile; then draft tokens turn out to be dear, and cheap again."""
    scheduler = make(PROFILE, warm_up=1, retry_every=8)
    dear = scaled(PROFILE, 1.0, 3.5, 3.5, 3.5)

    def share_drafted(truth: CostTable) -> float:
        drafted, rng = 0, np.random.default_rng(0)
        for _ in range(20 * REFRESH):
            wanted, lengths = scheduler.to_draft(Load((0, 1, 2, 3))), np.zeros(4, np.int64)
            lengths[wanted] = min(8, scheduler.slots_to_draft(Load((0, 1, 2, 3))))
            kept = scheduler.choose(rng.uniform(0.2, 0.9, (4, 8)), lengths, Load((0, 1, 2, 3))) if wanted else lengths
            scheduler.observe(step_of(truth, 4, int(kept.sum()), int(max(lengths))))
            drafted += len(wanted)
        return drafted / (4 * 20 * REFRESH)

    assert share_drafted(PROFILE) > 0.8
    share_drafted(dear)
    assert share_drafted(dear) < 0.3
    assert any(share_drafted(PROFILE) > 0.8 for _ in range(8))  # drafts for news are far apart
