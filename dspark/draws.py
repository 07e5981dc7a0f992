"""Seeded random numbers: each is a function of its key alone, so that it does not change with what runs beside it."""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Purpose", "sample_seed", "uniforms"]


class Purpose(IntEnum):
    """What a random number is for; one position needs up to three that are independent of each other."""

    DRAFT = 0  # sampling the draft token
    ACCEPT = 1  # keeping the draft tokens up to it
    TARGET = 2  # sampling the residual or bonus token


def _bits(state: int, *words: ArrayLike) -> Any:
    """64 random bits, uint64, for a key of several integers, which are broadcast against each other."""
    bits: Any = np.uint64(state)
    with np.errstate(over="ignore"):  # wrapping around is the point
        for word in words:
            z = (bits ^ np.asarray(word).astype(np.uint64)) + 0x9E3779B97F4A7C15
            # The finaliser of splitmix64: a bijection of 64-bit words; each input bit moves all output bits.
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB
            bits = z ^ (z >> 31)
    return bits


def uniforms(seeds: ArrayLike, positions: ArrayLike, purposes: ArrayLike, slots: ArrayLike = 0) -> NDArray[np.float64]:
    """The random numbers in [0, 1) that belong to these keys, broadcast against each other: the same whenever and
    wherever they are asked for.

    A position is the absolute one of the token drawn. For TARGET it is key enough: the draw is looked at once, for
    the token that is committed there. For DRAFT and ACCEPT the slot in the block must be part of the key. A position
    that was drafted in a round cut short before it is drafted again in a later round, always in an earlier slot. That
    the round was cut short tells of its acceptance draws. A scheduler that uses confidences of past rounds
    (StaleBudget) may have set its budget by what the first draft was; were the number reused, whether the new
    draft token is verified would depend on its own value. Either way the output would no longer follow the target.
    With the slot in the key the second draft and its verdict are fresh.
    """
    return (_bits(0, seeds, positions, purposes, slots) >> 11) * 2.0**-53


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's sample `index`: its own for the first, then unrelated ones."""
    return seed if index == 0 else int(_bits(1, seed, index)) >> 2
