"""Seeded random numbers: each is a function of its key alone, so that it does not change with what runs beside it."""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Purpose", "sample_seed", "uniform", "uniforms"]


class Purpose(IntEnum):
    """What a random number is for; one position needs up to three that are independent of each other."""

    DRAFT = 0  # sampling the draft token
    ACCEPT = 1  # keeping the draft tokens up to it
    TARGET = 2  # sampling the residual or bonus token


_MASK = 2**64 - 1


def _mix(z: Any) -> Any:  # an int or an array of uint64
    """The finaliser of splitmix64: a bijection of 64-bit words; each input bit moves all output bits."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _bits(state: Any, words: Iterable[Any]) -> Any:
    """64 random bits for a key of several words."""
    for word in words:
        state = _mix(((state ^ word) + 0x9E3779B97F4A7C15) & _MASK)
    return state


def uniform(seed: int, position: int, purpose: Purpose, slot: int = 0) -> float:
    """The random number in [0, 1) that belongs to this key, the same whenever and wherever it is asked for.

    `position` is the absolute position of the token drawn. For TARGET it is key enough: the draw is looked at once, for
    the token that is committed there. For DRAFT and ACCEPT the slot in the block must be part of the key. A position
    that was drafted in a round cut short before it is drafted again in a later round, always in an earlier slot. That
    the round was cut short tells of its acceptance draws. A scheduler that uses confidences of past rounds
    (StaleBudget) may have set its budget by what the first draft was; were the number reused, whether the new
    draft token is verified would depend on its own value. Either way the output would no longer follow the target.
    With the slot in the key the second draft and its verdict are fresh.
    """
    words = (seed & _MASK, position & _MASK, int(purpose), slot & _MASK)
    return (_bits(0, words) >> 11) * 2.0**-53


def uniforms(seeds: ArrayLike, positions: ArrayLike, purposes: ArrayLike, slots: ArrayLike = 0) -> NDArray[np.float64]:
    """`uniform` for integer arrays, broadcast against each other."""
    words = (np.asarray(word).astype(np.uint64) for word in (seeds, positions, purposes, slots))
    with np.errstate(over="ignore"):  # wrapping around is the point
        return (_bits(np.zeros((), np.uint64), words) >> 11) * 2.0**-53


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's sample `index`: its own for the first, then unrelated ones."""
    return seed if index == 0 else _bits(1, (seed & _MASK, index)) >> 2
