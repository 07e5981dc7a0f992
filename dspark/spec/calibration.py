"""Confidence that can be trusted: from what a drafter signals to calibrated probabilities (design §5).

A slot's signals are the confidence head's logit and the draft's evidence. `fit_weights` makes one score of them; `fit`
is Sequential Temperature Scaling of scores (DSpark paper; temperature scaling: Guo et al. 2017), and a shift beside it.
`Calibration` is their result and the side file beside a checkpoint; `OnlineCalibration` goes on learning while serving.

Shapes: N = recorded rounds, R = requests, G = slots of a block, S = signals of a slot. Slot k, from 0, belongs to the
prefix of k + 1 tokens.
"""

import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = [
    "Bin",
    "Calibration",
    "Calibrator",
    "OnlineCalibration",
    "brier",
    "expected_calibration_error",
    "fit",
    "fit_weights",
    "reliability_bins",
    "roc_auc",
    "weighed",
]

Floats = NDArray[np.float64]


class Calibrator(Protocol):
    """Turns signals into probabilities. Within a position it must not change the order of scores."""

    def confidence(self, signals: Tensor) -> Floats:
        """P(slot's token is accepted, given that all before it were): [R, G, S] -> [R, G], all in 0..1."""
        ...

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        """What became of a round, after verification: signals [R, G, S], verify_lengths [R], accepted [R]."""
        ...


@dataclass(frozen=True)
class Calibration:
    """Weights, one temperature and one shift a position. Written as JSON by `dspark.config.write_json`."""

    temperatures: tuple[float, ...]
    dataset: str = ""  # what they were fitted on
    num_samples: int = 0  # rounds
    ece_before: tuple[float, ...] = ()  # of each prefix' survival
    ece_after: tuple[float, ...] = ()
    shifts: tuple[float, ...] = ()  # added to z_k / T_k; none: 0
    # For each position, of signals and their products, see `weighed`; none: z_k is the head's logit.
    weights: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not all(0 < t < math.inf for t in self.temperatures):  # written so that NaN is refused too
            raise ValueError(f"temperatures must be finite and above 0, got {list(self.temperatures)}")
        if self.shifts and (len(self.shifts) != len(self.temperatures) or not all(map(math.isfinite, self.shifts))):
            raise ValueError(f"shifts must be finite and one a temperature, got {list(self.shifts)}")
        if self.weights and (
            len(self.weights) != len(self.temperatures)
            or len(set(map(len, self.weights))) > 1
            or not all(math.isfinite(w) for row in self.weights for w in row)
        ):
            raise ValueError(f"weights must be finite and one row a temperature, got {list(self.weights)}")
        if self.weights:
            count = len(self.weights[0])
            signals = (math.isqrt(9 + 8 * count) - 3) // 2  # S: count = S + S (S + 1) / 2
            if signals < 1 or count != signals * (signals + 3) // 2:
                raise ValueError(f"{count} weights are not those of any number of signals and their products by two")

    @classmethod
    def identity(cls, block_size: int) -> "Calibration":
        """The confidence head as it is."""
        return cls((1.0,) * block_size)

    @cached_property
    def _parameters(self) -> tuple[Floats, Floats, Floats]:
        """Weights, temperatures and shifts as arrays."""
        shifts = self.shifts or (0.0,) * len(self.temperatures)
        return np.array(self.weights), np.array(self.temperatures), np.array(shifts)

    def scaled(self, signals: Tensor) -> Floats:
        """z_k / T_k + b_k, [R, G], G at most the calibrated. Raises ValueError for signals of another drafter."""
        ours, theirs = len(self.temperatures), signals.shape[1]
        if ours < theirs:
            raise ValueError(f"the calibration is for {ours} draft tokens a round, the drafter makes {theirs}")
        weights, temperatures, shifts = self._parameters
        return weighed(signals, weights) / temperatures[:theirs] + shifts[:theirs]

    def confidence(self, signals: Tensor) -> Floats:
        """c_k = sigmoid(z_k / T_k + b_k); a score that is NaN gives 0."""
        return _sigmoid(self.scaled(signals))

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        """Learns nothing."""


def weighed(signals: Tensor, weights: ArrayLike) -> Floats:
    """Scores z_k [R, G]: signals [R, G, S] and their products, weighed by one row a position; without any, the head's
    logits. Raises ValueError for weights of other signals."""
    values, rows = signals.cpu().double().numpy(), np.asarray(weights, np.float64)
    if not len(rows):
        return values[..., 0]
    values = crossed(values)
    if (ours := rows.shape[1]) != (theirs := values.shape[-1]):
        raise ValueError(f"the calibration weighs {ours} signals and products a slot, the drafter gives {theirs}")
    with np.errstate(invalid="ignore"):  # a broken drafter's inf and NaN
        return np.einsum("rgs,gs->rg", values, rows[: values.shape[1]])


def crossed(signals: Floats) -> Floats:
    """Signals [..., S] and their products by two, [..., S + S (S + 1) / 2]: what one tells may depend on another."""
    first, second = _pairs(signals.shape[-1])
    with np.errstate(invalid="ignore"):
        return np.concatenate([signals, signals[..., first] * signals[..., second]], -1)


@cache
def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.triu_indices(count)


@dataclass
class OnlineCalibration:
    """`base` plus a further shift for each position, learnt from what is verified while serving.

    That shift follows the recursive Newton step for E[accepted] = E[c_k]: add up
    accepted - c_k over the verified slots whose predecessors were accepted, divide by the sum of c_k (1 - c_k), in
    which each newer observation makes older ones weigh `decay` times as much.
    """

    base: Calibration
    decay: float = 0.999
    prior: float = 20.0  # stands in for the sum before anything was seen: the first steps are short
    shift: Floats = field(init=False)  # b [G]
    information: Floats = field(init=False)  # [G]

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or not 0 < self.prior < math.inf:
            raise ValueError(f"decay must be in 0..1 and prior above 0, got {self.decay} and {self.prior}")
        self.shift, self.information = np.zeros((2, len(self.base.temperatures)))

    def confidence(self, signals: Tensor) -> Floats:
        return _sigmoid(self.base.scaled(signals) + self.shift[: signals.shape[1]])

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        slots, unseen = np.arange(signals.shape[1]), (0, len(self.shift) - signals.shape[1])
        scores = self.base.scaled(signals) + self.shift[: len(slots)]  # [R, G]
        confidence = _sigmoid(scores)
        stayed = accepted.numpy(force=True)[:, None]  # [R, 1]
        seen = slots < np.minimum(verify_lengths.numpy(force=True)[:, None], stayed + 1)
        seen &= np.isfinite(scores)
        outcome = seen & (slots < stayed)  # [R, G]

        def by_slot(values: NDArray) -> Floats:
            """Summed over requests, [G]: 0 where nothing was drafted."""
            return np.pad(values.sum(0), unseen)

        kept = self.information * self.decay ** by_slot(seen)
        self.information = kept + by_slot(confidence * (1 - confidence) * seen)
        self.shift = self.shift + by_slot((outcome - confidence) * seen) / (self.information + self.prior)


# ---- fitting

TEMPERATURES = np.geomspace(0.1, 10.0, 161)


def fit_weights(signals: Tensor, accepted: Tensor, steps: int = 300) -> tuple[tuple[float, ...], ...]:
    """Logistic regression of "slot k's token was accepted" where all before it were: [N, G, S], [N] -> rows for
    `weighed`; none where the head's logit is the only signal: that is what the temperature is for.

    The constant is left to the shift that `fit` finds beside the temperature. With little to go by the head's logit
    weighs 1 and nothing else does. The curvature is at most X'X / 4: steps that take it for that always climb (Boehning
    and Lindsay 1988).
    """
    kept = accepted.numpy(force=True)
    if signals.shape[-1] == 1:
        return ()
    every = crossed(signals.cpu().double().numpy())
    _, num_slots, num_signals = every.shape
    head = np.eye(num_signals + 1)[0]
    weights = []
    for k in range(num_slots):
        used = (kept >= k) & np.isfinite(every[:, k]).all(-1)
        x, outcome = np.pad(every[used, k], ((0, 0), (0, 1)), constant_values=1.0), kept[used] > k
        bound = np.linalg.inv(x.T @ x / 4 + np.eye(num_signals + 1))
        w = head
        for _ in range(steps):
            w = w + bound @ (x.T @ (outcome - _sigmoid(x @ w)) - (w - head))
        weights.append(tuple(w[:-1].tolist()))
    return tuple(weights)


def fit(logits: ArrayLike, accepted: ArrayLike, shifted: bool = True) -> Calibration:
    """Sequential Temperature Scaling: scores [N, G] and accepted tokens [N] of fully verified rounds -> T and b.

    From left to right, T_k is the one of TEMPERATURES that minimises the ECE of prod_{i<=k} sigmoid(z_i / T_i + b_i)
    against "slots 0..k were accepted"; earlier ones stay. Of equally good ones, the nearest to 1. b_k is what makes
    the mean right for that T_k, which no temperature can; 0 unless `shifted`, and the method is then the paper's.
    """
    z = np.asarray(logits, dtype=np.float64)
    kept = np.asarray(accepted)
    if z.ndim != 2 or len(z) == 0 or kept.shape != (len(z),):
        raise ValueError(f"logits must be [N, G] and accepted [N], N at least 1, got {z.shape} and {kept.shape}")
    by_distance = TEMPERATURES[np.argsort(np.abs(np.log(TEMPERATURES)), kind="stable")]  # min(): the first of equals
    survival, temperatures, shifts = np.ones(len(z)), [], []
    for k in range(z.shape[1]):
        outcome = kept > k
        candidates = []
        for t in by_distance:
            shift = _mean_matching_shift(z[:, k] / t, survival, outcome.mean()) if shifted else 0.0
            candidates.append((t, shift, survival * _sigmoid(z[:, k] / t + shift)))
        best = min(candidates, key=lambda c: expected_calibration_error(c[2], outcome))
        temperatures.append(float(best[0]))
        shifts.append(float(best[1]))
        survival = best[2]
    return Calibration(tuple(temperatures), shifts=tuple(shifts))


def _mean_matching_shift(scaled: Floats, survival: Floats, mean: float, most: float = 8.0) -> float:
    """b in -most..most with mean(survival * sigmoid(scaled + b)) = mean, by bisection: it rises with b."""
    low, high = -most, most
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(survival * _sigmoid(scaled + middle)) < mean else (low, middle)
    return (low + high) / 2


def _sigmoid(z: Floats) -> Floats:
    """Of NaN: 0."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.fmax(z, -80.0)))


# ---- how good probabilities are: probability [N] of an event, outcome [N] whether it happened


class Bin(NamedTuple):
    """One bar of a reliability diagram; means are NaN where nothing fell into it."""

    probability: float
    outcome: float
    samples: int


def reliability_bins(probability: ArrayLike, outcome: ArrayLike, bins: int = 15) -> list[Bin]:
    """Equal parts of 0..1: mean probability, how often it happened, how many."""
    count, probabilities, outcomes = _binned(probability, outcome, bins)
    with np.errstate(invalid="ignore"):
        means = probabilities / count, outcomes / count
    return [Bin(float(p), float(o), int(n)) for p, o, n in zip(*means, count)]


def expected_calibration_error(probability: ArrayLike, outcome: ArrayLike, bins: int = 15) -> float:
    """ECE (Guo et al. 2017, eq. 3): mean over all N of |mean probability - mean outcome| of their bin."""
    count, probabilities, outcomes = _binned(probability, outcome, bins)
    return float(np.abs(probabilities - outcomes).sum() / count.sum())


def _binned(probability: ArrayLike, outcome: ArrayLike, bins: int) -> tuple[Floats, Floats, Floats]:
    """By bin: how many, sum of probabilities, sum of outcomes."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins).astype(np.float64)
    return count, np.bincount(index, p, bins).astype(np.float64), np.bincount(index, y, bins).astype(np.float64)


def roc_auc(probability: ArrayLike, outcome: ArrayLike) -> float:
    """P(a random event that happened had the higher probability), ties half; NaN where all outcomes agree."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=bool)
    if y.all() or not y.any():
        return math.nan
    others = np.sort(p[~y])
    lower, not_higher = (np.searchsorted(others, p[y], side) for side in ("left", "right"))
    return float(np.mean(lower + not_higher) / 2 / len(others))


def brier(probability: ArrayLike, outcome: ArrayLike) -> float:
    """Mean squared distance of probability and outcome."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    return float(np.mean((p - y) ** 2))
