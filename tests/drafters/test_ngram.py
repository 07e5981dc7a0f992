"""Prompt lookup proposes what followed the last occurrence of the sequence's own end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.drafters.ngram import NgramDrafter
from tests.drafters.test_dspark import Request


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 9, 1, 2, 5, 9, 1, 2], [5, 9, 1]),  # the latest occurrence
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # a longer match counts more than a later one
        ([7, 7, 7, 7], [7, 7, 7]),  # a match may overlap the end: what repeats is expected to go on
        ([9, 1, 2, 1, 2], [1, 2, 1]),
        ([1, 2, 3, 4], []),
        ([5, 1, 5], []),  # a single token is too short a match
        ([1], []),
    ],
)
def test_lookup(token_ids: list[int], expected: list[int]):
    assert NgramDrafter(3).lookup(token_ids) == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 5))
def test_what_is_proposed_stood_behind_the_longest_match(token_ids: list[int], block_size: int):
    """Against the definition: try every place for every length, longest first, latest first."""
    drafter = NgramDrafter(block_size, max_ngram=3, min_ngram=1)
    places = [
        (n, end)
        for n in range(1, 4)
        for end in range(n, len(token_ids))
        if n < len(token_ids) and token_ids[end - n : end] == token_ids[-n:]
    ]
    behind = token_ids[max(places)[1] :] if places else []
    expected = (behind * block_size)[:block_size]  # what repeats goes on
    assert drafter.lookup(token_ids) == expected


def test_a_batch_of_requests_with_and_without_a_match():
    """Lengths say how much of each row is a proposal; a proposal is certain, so its probability is one."""
    draft = NgramDrafter(3).propose([Request([1, 2, 3, 4, 1, 2]), Request([1, 2]), Request([6, 6, 6])], 3)
    assert draft.lengths.tolist() == [3, 0, 3]
    assert draft.tokens[0].tolist() == [3, 4, 1]
    assert draft.tokens[2, 0] == 6
    assert draft.draft_probs.eq(1).all()


@pytest.mark.parametrize("sizes", [(0, 4, 2), (3, 1, 2), (3, 4, 0)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ValueError, match="n-gram drafting needs"):
        NgramDrafter(*sizes)
