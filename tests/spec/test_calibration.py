"""Calibration: temperatures are recovered, order is kept, the online form converges, metrics mean what they say.

Shapes: N rounds, G slots.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark.config import read_json, write_json
from dspark.spec.calibration import (
    Calibration,
    Calibrator,
    OnlineCalibration,
    brier,
    expected_calibration_error,
    fit,
    fit_weights,
    reliability_bins,
    roc_auc,
    weighed,
)


def rounds(n: int, temperatures: tuple[float, ...], shift: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [N, G] and accepted tokens [N], where sigmoid(z / T + shift) is the truth."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(2.0, 3.0, (n, len(temperatures)))
    truth = 1 / (1 + np.exp(-(logits / temperatures + shift)))
    passed = generator.random(logits.shape) < truth
    return torch.from_numpy(logits), torch.from_numpy(passed.cumprod(1).sum(1))


def prefix_errors(calibrator: Calibrator, logits: Tensor, accepted: Tensor) -> list[float]:
    survival = calibrator.confidence(logits[..., None]).cumprod(1)
    return [expected_calibration_error(survival[:, k], (accepted > k).numpy()) for k in range(logits.shape[1])]


def test_known_temperatures_are_recovered() -> None:
    truth = (0.5, 1.0, 2.5, 4.0)
    logits, accepted = rounds(40_000, truth)
    fitted = fit(logits, accepted, shifted=False)
    np.testing.assert_allclose(np.log(fitted.temperatures), np.log(truth), atol=0.3)
    held_out = rounds(40_000, truth, seed=1)
    before = prefix_errors(Calibration.identity(4), *held_out)
    after = prefix_errors(fitted, *held_out)
    assert max(after) < 0.015 < max(before)


def test_a_shift_makes_up_for_what_no_temperature_can() -> None:
    logits, accepted = rounds(20_000, (1.0, 2.0, 0.7), shift=-1.5)
    held_out = rounds(20_000, (1.0, 2.0, 0.7), shift=-1.5, seed=1)
    unshifted, shifted = (fit(logits, accepted, s) for s in (False, True))
    np.testing.assert_allclose(shifted.shifts, -1.5, atol=0.3)
    assert max(prefix_errors(unshifted, *held_out)) > 0.05
    assert max(prefix_errors(shifted, *held_out)) < 0.015


def test_known_weights_are_recovered() -> None:
    """Up to scale and constant, which temperature and shift make up for; the scores tell more than the head does."""
    truth = np.array([[1.0, 4.0, 0.5, -1.0, 0.0], [1.0, -0.5, 0.0, 0.0, 0.3]])  # of two signals, then of products

    def evident(seed: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng(seed)
        signals = torch.from_numpy(generator.normal(0.0, 1.5, (20_000, 2, 2)))
        scores = torch.from_numpy(weighed(signals, truth) / 2 + 1.0)
        passed = torch.from_numpy(generator.random((20_000, 2))) < scores.sigmoid()
        return signals, passed.long().cumprod(1).sum(1)

    signals, accepted = evident(0)
    weights = fit_weights(signals, accepted)
    np.testing.assert_allclose(weights, truth / 2, rtol=0.15, atol=0.05)
    fitted = replace(fit(weighed(signals, weights), accepted), weights=weights)
    held_out, kept = evident(1)
    for k in range(2):
        sure, unsure = (c.confidence(held_out).cumprod(1)[:, k] for c in (fitted, Calibration.identity(2)))
        assert roc_auc(sure, kept > k) > roc_auc(unsure, kept > k) + 0.05
        assert expected_calibration_error(sure, kept > k) < 0.02


def test_with_nothing_to_go_by_the_head_is_taken_as_it_is() -> None:
    signals = torch.full((5, 2, 3), math.nan)
    assert fit_weights(signals, torch.ones(5)) == ((1.0,) + (0.0,) * 8,) * 2
    assert fit_weights(signals[..., :1], torch.ones(5)) == ()  # there is only the head


def test_fitting_takes_any_logits() -> None:
    logits, accepted = rounds(500, (1.0, 1.0))
    logits[::7, 0], logits[::5, 1], logits[::3, 1] = math.nan, math.inf, -math.inf
    for shifted in (False, True):
        fitted = fit(logits, accepted, shifted)
        assert all(0 < t < math.inf for t in fitted.temperatures) and all(map(math.isfinite, fitted.shifts))
    constant = torch.zeros(100, 2)
    unshifted = fit(constant, torch.ones(100), shifted=False)
    assert unshifted.temperatures == pytest.approx((1.0, 1.0))  # all are equally good
    assert unshifted.shifts == (0, 0)
    with pytest.raises(ValueError, match="N at least 1"):
        fit(torch.zeros(0, 2), torch.zeros(0))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 1)), min_size=2, max_size=8),
    st.floats(0.05, 20),
    st.floats(-3, 3),
    st.sampled_from([(), ((1.0, 0.0, 0.0, 0.0, 0.0),), ((0.5, 4.0, 0.0, 0.0, 0.0),)]),
)
def test_order_within_a_position_is_kept(
    values: list[tuple[float, float]], temperature: float, shift: float, weights: tuple[tuple[float, ...], ...]
) -> None:
    """That of the scores, which without weights is that of the head's logits."""
    signals = torch.tensor(values, dtype=torch.float64)[:, None]  # [N, 1, 2]
    scores = signals[:, 0] @ torch.tensor(weights[0][:2] if weights else (1.0, 0.0), dtype=torch.float64)
    online = OnlineCalibration(Calibration((temperature,), shifts=(-shift / 2,), weights=weights))
    online.shift[:] = shift
    for calibrator in (online.base, online):
        confidence = calibrator.confidence(signals)[:, 0]
        assert (np.diff(confidence[scores.argsort().numpy()]) >= 0).all()
        assert ((confidence >= 0) & (confidence <= 1)).all()


def test_whatever_the_drafter_emits_is_a_probability() -> None:
    signals = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])[..., None]
    online = OnlineCalibration(Calibration.identity(4))
    for _ in range(3):
        for calibrator in (online.base, online):
            assert calibrator.confidence(signals)[0, :3].tolist() == [0.0, 1.0, 0.0]
        online.observe(signals, torch.tensor([4]), torch.tensor([4]))
    assert np.isfinite(online.shift).all()


def test_online_calibration_converges_and_follows() -> None:
    online = OnlineCalibration(Calibration((1.0, 2.0)))
    for shift in (-2.0, 1.5):  # the second: the traffic changes
        logits, accepted = rounds(12_000, (1.0, 2.0), shift)
        for batch in range(0, len(logits), 8):
            part = slice(batch, batch + 8)
            online.observe(logits[part][..., None], torch.full((8,), 2), accepted[part])
        np.testing.assert_allclose(online.shift, shift, atol=0.35)
        assert max(prefix_errors(online, *rounds(12_000, (1.0, 2.0), shift, seed=1))) < 0.03


def test_only_slots_that_were_decided_count() -> None:
    """Verified, and all before them accepted: by hand, 3 requests of 3 slots."""
    online = OnlineCalibration(Calibration.identity(3), decay=1.0)
    online.observe(torch.zeros(3, 3, 1), torch.tensor([3, 2, 0]), torch.tensor([1, 2, 0]))
    assert online.information.tolist() == [2 / 4, 2 / 4, 0]  # two requests in the first slot and in the second
    assert online.shift.tolist() == [(0.5 + 0.5) / 20.5, (0.5 - 0.5) / 20.5, 0]


def test_side_file(tmp_path: Path) -> None:
    weights = ((0.5, 2.0, 1.0, 0.0, 0.25), (1.0, 0.0, 0.0, 0.0, 0.0))
    calibration = Calibration((0.5, 2.0), "prompts", 10, (0.2, 0.1), (0.01, 0.02), (-0.5, 0.25), weights)
    write_json(calibration, tmp_path / "calibration.json")
    assert read_json(Calibration, tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperatures must be finite and above 0"):
        Calibration((1.0, temperature))
    with pytest.raises(ValueError, match="shifts must be finite"):
        Calibration((1.0, 1.0), shifts=(0.0, math.nan))


@pytest.mark.parametrize("weights", [((1.0,),), ((1.0,), (1.0, 2.0)), ((1.0,), (math.nan,))])
def test_impossible_weights_are_refused(weights: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        Calibration((1.0, 1.0), weights=weights)
    with pytest.raises(ValueError, match="3 weights are not those of any number of signals"):
        Calibration((1.0,), weights=((1.0, 0.5, 0.1),))


def test_scores_are_sums_of_signals_and_products() -> None:
    generator = np.random.default_rng(0)
    signals, rows = generator.normal(size=(5, 2, 3)), generator.normal(size=(4, 9))
    products = [signals[..., i] * signals[..., j] for i in range(3) for j in range(i, 3)]
    expected = (np.concatenate([signals, np.stack(products, -1)], -1) * rows[:2]).sum(-1)
    np.testing.assert_allclose(weighed(torch.from_numpy(signals), rows), expected)


def test_a_calibration_of_another_drafter_is_refused() -> None:
    with pytest.raises(ValueError, match="for 1 draft tokens a round, the drafter makes 2"):
        Calibration((1.0,)).confidence(torch.zeros(3, 2, 1))
    with pytest.raises(ValueError, match="weighs 5 signals and products a slot, the drafter gives 2"):
        Calibration((1.0,), weights=((1.0, 0.5, 0.1, 0.0, 0.0),)).confidence(torch.zeros(3, 1, 1))


def test_metrics_by_hand() -> None:
    probability, outcome = [0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]
    assert expected_calibration_error(probability, outcome, bins=2) == pytest.approx((0.4 * 2 + 0.1 * 2) / 4)
    assert brier(probability, outcome) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    assert roc_auc(probability, outcome) == pytest.approx((1 * 2 + 0.5) / 3)
    assert math.isnan(roc_auc(probability, [1, 1, 1, 1]))
    low, high = reliability_bins(probability, outcome, bins=2)
    assert low == (pytest.approx(0.1), 0.5, 2) and high == (pytest.approx(0.9), 1.0, 2)
    assert [b.samples for b in reliability_bins([0.0, 1.0], [0, 1], bins=4)] == [1, 0, 0, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_counts_pairs(samples: list[tuple[int, bool]]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p, hit in samples if hit for n, miss in samples if not miss]
    auc = roc_auc([p for p, _ in samples], [hit for _, hit in samples])
    assert auc == pytest.approx(np.mean(pairs)) if pairs else math.isnan(auc)
