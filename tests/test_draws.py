"""Seeded random numbers."""

import math

import numpy as np

from dspark.draws import Purpose, sample_seed, uniforms


def test_each_number_is_a_function_of_its_key_alone() -> None:
    """By hand: splitmix64 over the words of the key, in Python's integers."""

    def uniform(*words: int) -> float:
        bits, mask = 0, 2**64 - 1
        for word in words:
            z = ((bits ^ (word & mask)) + 0x9E3779B97F4A7C15) & mask
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
            bits = z ^ (z >> 31)
        return (bits >> 11) * 2.0**-53

    seeds, positions, slots = np.array([[0], [-5], [2**62]]), np.arange(4), np.array([3, 0, 1, 2])
    for purpose in Purpose:
        expected = [
            [uniform(seed, position, purpose, slot) for position, slot in zip(range(4), [3, 0, 1, 2], strict=True)]
            for seed in seeds[:, 0].tolist()
        ]
        assert uniforms(seeds, positions, purpose, slots).tolist() == expected
    assert float(uniforms(7, 8, Purpose.DRAFT)) == uniform(7, 8, Purpose.DRAFT, 0)


def test_draws_do_not_change() -> None:
    """Seeded outputs are a promise to users: these values were printed by the first version."""
    assert uniforms(0, 0, Purpose.DRAFT, 0) == 0.1296456182997474
    assert uniforms(1, 2, Purpose.DRAFT, 3) == 0.5899718292247013
    assert uniforms(1, 2, Purpose.ACCEPT, 0) == 0.06266048611631447
    assert uniforms(-1, 1000000, Purpose.TARGET, 0) == 0.6959292366512922
    assert sample_seed(-7, 3) == 1425290233085389768


def test_distinct_keys_have_distinct_values() -> None:
    seeds, positions, slots = np.ix_(np.arange(-20, 20), np.arange(100), np.arange(8))
    draws = np.concatenate([uniforms(seeds, positions, purpose, slots).ravel() for purpose in Purpose])
    assert len(np.unique(draws)) == len(draws) == 96_000
    assert draws.min() >= 0 and draws.max() < 1


def test_uniform_looks_uniform_and_independent() -> None:
    """Moments of 200,000 draws, and correlations along every coordinate of the key, within 5 sigma."""
    count = 200_000
    sigma = 1 / math.sqrt(count)
    index = np.arange(count)
    base = uniforms(3, index, Purpose.ACCEPT)
    assert abs(base.mean() - 1 / 2) < 5 * sigma * math.sqrt(1 / 12)
    assert abs(base.var() - 1 / 12) < 5 * sigma * math.sqrt(1 / 180)
    neighbours = {
        "next position": uniforms(3, index + 1, Purpose.ACCEPT),
        "next seed": uniforms(4, index, Purpose.ACCEPT),
        "other purpose": uniforms(3, index, Purpose.TARGET),
        "next slot": uniforms(3, index, Purpose.ACCEPT, 1),
        "seed and position swapped": uniforms(index, 3, Purpose.ACCEPT),
    }
    for name, other in neighbours.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 * sigma, name
    # Pairs fill the square evenly: chi-square with 399 degrees of freedom.
    cells = np.histogram2d(base, neighbours["next position"], bins=20, range=[[0, 1], [0, 1]])[0]
    chi_square = ((cells - count / 400) ** 2 / (count / 400)).sum()
    assert abs(chi_square - 399) < 5 * math.sqrt(2 * 399)
