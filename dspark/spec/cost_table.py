"""What a step costs on this machine: seconds by batch tokens and by requests drafted for (design §5).

The prefix schedulers divide expected tokens by these seconds. The curve may be as jagged as the machine makes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["CostTable"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CostTable:
    """Profiled seconds of one model, number format and machine; they never fall as sizes rise.

    Written as JSON by `dspark.config.write_json`. Without a drafter `requests` and `draft_seconds` are empty.
    """

    model: str
    dtype: str
    machine: str
    batch_tokens: tuple[int, ...]
    target_seconds: tuple[float, ...]  # of a target forward on that many tokens, each of a request of its own
    requests: tuple[int, ...]
    draft_seconds: tuple[float, ...]  # of a draft pass for that many requests, blocks of `slots` slots
    step_seconds: float  # what each step costs besides
    context_seconds: float = 0.0  # part of target_seconds that grows with requests, not with tokens: for each of them
    slots: int = 1
    short_slots: int = 1
    short_draft_seconds: tuple[float, ...] = ()  # of a draft pass with blocks of `short_slots`; none: the same

    def __hash__(self) -> int:
        """Of a part: caches ask for it several times a step."""
        return hash((self.step_seconds, self.target_seconds))

    def __post_init__(self) -> None:
        _check_curve("batch_tokens", self.batch_tokens, "target_seconds", self.target_seconds)
        if self.requests or self.draft_seconds:
            _check_curve("requests", self.requests, "draft_seconds", self.draft_seconds)
        if self.short_draft_seconds:
            _check_curve("requests", self.requests, "short_draft_seconds", self.short_draft_seconds)
            if not 1 <= self.short_slots < self.slots:
                raise ValueError(f"short_slots must be 1 or more and below slots, got {self.short_slots}, {self.slots}")
            if any(short > whole for short, whole in zip(self.short_draft_seconds, self.draft_seconds)):
                raise ValueError("short_draft_seconds must not be above draft_seconds")
        for name in ("step_seconds", "context_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    @cached_property
    def _token_seconds(self) -> Floats:
        """Of a target forward less its requests' contexts; it does not fall either."""
        return np.maximum.accumulate(np.array(self.target_seconds) - self.context_seconds * np.array(self.batch_tokens))

    def target(self, batch_tokens: ArrayLike, requests: ArrayLike) -> Floats:
        """Seconds of a target forward on the tokens of so many requests, elementwise.

        A request's tokens read its context together, so a draft token costs less than another request's token.
        """
        seconds = _at(batch_tokens, self.batch_tokens, self._token_seconds)
        return seconds + self.context_seconds * np.asarray(requests)

    def draft(self, requests: ArrayLike, slots: int | None = None) -> Floats:
        """Seconds of a draft pass, elementwise, with blocks of so many slots, None: whole ones; for nobody it is 0."""
        if not self.requests:
            return np.zeros(np.shape(requests))
        whole = _at(requests, self.requests, self.draft_seconds)
        short = _at(requests, self.requests, self.short_draft_seconds or self.draft_seconds)
        missing = 0.0 if slots is None else self.slots - slots
        seconds = whole - (whole - short) * (missing / max(1, self.slots - self.short_slots))
        return np.where(np.asarray(requests) > 0, np.maximum(seconds, 0.0), 0.0)

    def seconds(
        self, batch_tokens: ArrayLike, requests: ArrayLike, drafted: ArrayLike = 0, slots: int | None = None
    ) -> Floats:
        """Seconds of a whole step, elementwise: 1 / SPS(B); drafted, slots: requests drafted for, see `draft`."""
        return self.step_seconds + self.target(batch_tokens, requests) + self.draft(drafted, slots)


def _at(size: ArrayLike, sizes: Sequence[int], seconds: Sequence[float] | Floats) -> Floats:
    """Linear between the measured sizes, the first value below them, the last slope past them."""
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
    at = np.asarray(size, np.float64)
    return np.interp(at, sizes, seconds) + slope * np.maximum(at - sizes[-1], 0.0)


def _check_curve(sizes_name: str, sizes: Sequence[int], seconds_name: str, seconds: Sequence[float]) -> None:
    if len(sizes) != len(seconds):
        raise ValueError(f"{sizes_name} has {len(sizes)} entries, {seconds_name} {len(seconds)}: the table has holes")
    if not sizes:
        raise ValueError(f"{sizes_name} is empty: nothing was measured")
    if sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(f"{sizes_name} must start at 1 or more and rise strictly, got {list(sizes)}")
    if not all(0 < value < math.inf for value in seconds):  # written so that NaN is refused too
        raise ValueError(f"{seconds_name} must be finite and above 0, got {list(seconds)}")
    if any(b < a for a, b in pairwise(seconds)):
        raise ValueError(f"{seconds_name} must not fall as {sizes_name} rises, got {list(seconds)}")
