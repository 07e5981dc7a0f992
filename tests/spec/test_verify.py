"""`verify` on ragged batches against the naive reference, at temperature 0, and at its edges.

Shapes: R = requests, G = slots, M = support, V = vocabulary size, B = sum of 1 + verify length.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark.spec.draft import Draft
from dspark.spec.verify import residual_weights, verify, verify_greedy
from tests.spec.exact import ending_of_rows, ratios_of_rows
from tests.spec.reference import verify_reference


def random_probs(generator: np.random.Generator, shape: tuple[int, ...], zeros: float) -> Tensor:
    """Rows sum to 1; about this share of entries is 0, at least one is not."""
    weights = generator.random(shape) * (generator.random(shape) >= zeros)
    weights += (weights.sum(-1, keepdims=True) == 0) * generator.multinomial(1, [1 / shape[-1]] * shape[-1], shape[:-1])
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True))


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Tensor, Draft, Tensor, Tensor, Tensor]:
    """The arguments of `verify`: any shape, lengths from 0, sparse distributions, pruned supports."""
    requests, gamma = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    vocab = draw(st.integers(1, 6))
    support_size = draw(st.integers(1, vocab))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.9]))
    lengths = draw(st.lists(st.integers(0, gamma), min_size=requests, max_size=requests))
    verify_lengths = [draw(st.integers(0, length)) for length in lengths]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    shape = (requests, gamma, support_size)
    support = np.zeros(shape, dtype=np.int64)
    for r, k in np.ndindex(*shape[:2]):
        support[r, k] = generator.permutation(vocab)[:support_size]
    draft_probs = random_probs(generator, shape, zeros)
    cumulative = draft_probs.cumsum(-1)
    chosen = (torch.from_numpy(generator.random((requests, gamma, 1))) * cumulative[..., -1:] >= cumulative).sum(-1)
    support = torch.from_numpy(support)
    draft = Draft(
        tokens=support.gather(-1, chosen[..., None]).squeeze(-1),
        support=support,
        draft_probs=draft_probs,
        lengths=torch.tensor(lengths),
        signals=torch.zeros(requests, gamma, 1),
    )
    return (
        random_probs(generator, (sum(verify_lengths) + requests, vocab), zeros),
        draft,
        torch.tensor(verify_lengths),
        torch.from_numpy(generator.random((requests, gamma))),
        torch.from_numpy(generator.random((requests, gamma + 1))),
    )


@given(rounds())
def test_equals_reference(arguments: tuple[Tensor, Draft, Tensor, Tensor, Tensor]) -> None:
    verdict, expected = verify(*arguments), verify_reference(*arguments)
    assert verdict.accepted.tolist() == expected.accepted.tolist()
    assert verdict.next_token.tolist() == expected.next_token.tolist()


@given(rounds())
def test_never_commits_what_the_target_excludes(
    arguments: tuple[Tensor, Draft, Tensor, Tensor, Tensor],
) -> None:
    target_probs, draft, verify_lengths, _, _ = arguments
    verdict = verify(*arguments)
    first_row = 0
    for r, length in enumerate(verify_lengths.tolist()):
        count = int(verdict.accepted[r])
        committed = [*draft.tokens[r, :count].tolist(), int(verdict.next_token[r])]
        assert all(target_probs[first_row + i, token] > 0 for i, token in enumerate(committed))
        first_row += length + 1


@given(rounds())
def test_greedy_equals_one_hot_rows(arguments: tuple[Tensor, Draft, Tensor, Tensor, Tensor]) -> None:
    target_probs, draft, verify_lengths, accept_uniforms, target_uniforms = arguments
    target_argmax = target_probs.argmax(-1)
    one_hot = torch.nn.functional.one_hot(target_argmax, target_probs.shape[-1]).double()
    expected = verify(one_hot, draft, verify_lengths, accept_uniforms, target_uniforms)
    verdict = verify_greedy(target_argmax, draft.tokens, verify_lengths)
    assert verdict.accepted.tolist() == expected.accepted.tolist()
    assert verdict.next_token.tolist() == expected.next_token.tolist()


def unsampled_draft(tokens: list[list[int]]) -> Draft:
    requests, gamma = len(tokens), len(tokens[0])
    return Draft.unsampled(torch.tensor(tokens), torch.full((requests,), gamma), torch.zeros(requests, gamma, 1))


def test_greedy_by_hand() -> None:
    """Three requests: all accepted, rejected at the second slot, nothing verified."""
    argmax = torch.tensor([1, 2, 3, 1, 7, 9, 4])
    tokens = torch.tensor([[1, 2], [1, 2], [1, 2]])
    verdict = verify_greedy(argmax, tokens, torch.tensor([2, 2, 0]))
    assert verdict.accepted.tolist() == [2, 1, 0]
    assert verdict.next_token.tolist() == [3, 7, 4]


def test_a_batch_may_mix_greedy_and_sampled_requests() -> None:
    """The sampled request gets the same result beside a greedy one as alone."""
    greedy_rows = torch.eye(3)[[1, 2]]
    sampled_rows = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    accept_uniforms = torch.tensor([[0.99], [0.4]], dtype=torch.float64)
    target_uniforms = torch.tensor([[0.5, 0.5], [0.6, 0.2]], dtype=torch.float64)
    draft = unsampled_draft([[1], [0]])
    together = verify(
        torch.cat([greedy_rows, sampled_rows]), draft, torch.tensor([1, 1]), accept_uniforms, target_uniforms
    )
    alone = verify(sampled_rows, unsampled_draft([[0]]), torch.tensor([1]), accept_uniforms[1:], target_uniforms[1:])
    assert together.accepted.tolist() == [1, 1]
    assert together.next_token.tolist() == [2, 1]
    assert (together.accepted[1], together.next_token[1]) == (alone.accepted[0], alone.next_token[0])


def test_the_smallest_draw_does_not_accept_the_impossible() -> None:
    target_probs = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    verdict = verify(target_probs, unsampled_draft([[0]]), torch.tensor([1]), torch.zeros(1, 1), torch.zeros(1, 2))
    assert (verdict.accepted.tolist(), verdict.next_token.tolist()) == ([0], [1])


def test_padding_slots_do_not_matter() -> None:
    """An n-gram drafter may find nothing: what its slots then hold is never looked at."""
    draft = unsampled_draft([[1, 0], [2, 2]])
    draft.lengths = torch.tensor([1, 0])
    draft.draft_probs[1] = torch.nan
    target_probs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    verdict = verify(target_probs, draft, torch.tensor([1, 0]), torch.full((2, 2), 0.5), torch.full((2, 3), 0.5))
    assert verdict.accepted.tolist() == [1, 0]
    assert verdict.next_token.tolist() == [2, 0]


def test_more_slots_than_drafted_is_a_bug() -> None:
    draft = unsampled_draft([[1, 0]])
    draft.lengths = torch.tensor([1])
    with pytest.raises(AssertionError, match="without a draft token"):
        verify(torch.full((3, 2), 0.5), draft, torch.tensor([2]), torch.zeros(1, 2), torch.zeros(1, 3))


def test_the_formulas_by_hand() -> None:
    """Support out of order, with a padding entry that repeats an id; w is 1, then 0.6."""
    target_probs = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(4, -1)
    support = torch.tensor([[2, 0, 0]]).expand(4, -1)
    draft_probs = torch.tensor([[0.8, 0.2, 0.0]]).expand(4, -1)
    ratios = ratios_of_rows(target_probs, torch.arange(4), support, draft_probs)
    torch.testing.assert_close(ratios[[0, 2, 3]], torch.tensor([2.5, 0.25, 0.0]))
    prefix_probs = torch.tensor([1.0, 0.6])
    rows = target_probs[:2], support[:2], draft_probs[:2], prefix_probs
    torch.testing.assert_close(residual_weights(*rows), torch.tensor([[0.3, 0.3, 0, 0], [0.1, 0.18, 0, 0]]))
    torch.testing.assert_close(ending_of_rows(*rows), torch.tensor([1.0, 0.28 / (0.28 + 0.4)]))
    last = target_probs[:2], support[:2], torch.zeros(2, 3), prefix_probs
    torch.testing.assert_close(ending_of_rows(*last), prefix_probs)
    torch.testing.assert_close(residual_weights(*last), prefix_probs[:, None] * target_probs[:2])


def test_residual_of_equal_distributions_is_the_target() -> None:
    target_probs = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    support = torch.tensor([[0, 1], [0, 1]])
    assert residual_weights(target_probs, support, target_probs, torch.ones(2)).equal(target_probs)


def test_a_surplus_makes_up_for_an_unlikely_token_before_it() -> None:
    """The example of Sun et al.: p = (1/3, 2/3), q = (2/3, 1/3), two tokens drafted. One by one 10/9 stay, so 11/9."""
    draft_probs, target_row = torch.tensor([2 / 3, 1 / 3]), torch.tensor([1 / 3, 2 / 3])
    count = 200
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    first, second = torch.cartesian_prod(uniforms, uniforms).T
    accept_uniforms = torch.stack([first, second], 1)
    kept = 0.0
    for block in ([0, 0], [0, 1], [1, 0], [1, 1]):
        tokens = torch.tensor([block]).expand(len(first), -1)
        shape = len(first), 2, 2
        lengths = torch.full((len(first),), 2)
        draft = Draft(
            tokens, torch.arange(2).expand(shape), draft_probs.expand(shape), lengths, torch.zeros(len(first), 2, 1)
        )
        rows = target_row.expand(3 * len(first), -1)
        verdict = verify(rows, draft, lengths, accept_uniforms, torch.zeros(len(first), 3))
        kept += float(draft_probs[block].prod() * verdict.accepted.double().mean())
    assert kept == pytest.approx(11 / 9, abs=0.01)


def test_a_draft_is_placed_where_each_of_its_tensors_is() -> None:
    """Lengths are on the host, the rest may be on another device."""
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    draft = Draft.unsampled(tokens, torch.tensor([3, 1]), torch.zeros(2, 3, 1, device="meta"))
    placed = draft.placed([0, 2], 4)
    assert placed.lengths.tolist() == [3, 0, 1, 0]
    assert placed.tokens.shape == (4, 3) and placed.tokens.device.type == "meta"
