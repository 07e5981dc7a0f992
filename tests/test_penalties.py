"""Bias, penalties and minimum length: by hand, against Transformers, against a naive version, and in the exact law.

Shapes: V = vocabulary size.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from dspark.penalties import Prefix, adjusted_logits
from dspark.sampling import SamplingParams, truncated_probs
from tests.engine.plain import naive_adjusted
from tests.spec.exact import (
    Request,
    Target,
    Tokens,
    drawn_beforehand,
    fixed_length,
    joint_law,
    random_confidence,
    random_drafter,
    random_target,
    target_law,
    threshold,
    total_variation,
)

LOGITS = torch.tensor([[2.0, -2.0, 1.0, 0.5, 3.0]])


def adjust(params: SamplingParams, prompt: list[int], output: list[int], end_ids: tuple[int, ...] = ()) -> list[float]:
    return adjusted_logits(LOGITS, [Prefix(params, prompt + output, len(prompt), frozenset(end_ids))])[0].tolist()


def test_by_hand() -> None:
    prompt, output = [0, 1], [2, 2, 4]
    assert adjust(SamplingParams(), prompt, output) == [2, -2, 1, 0.5, 3]
    assert adjust(SamplingParams(presence_penalty=0.5), prompt, output) == [2, -2, 0.5, 0.5, 2.5]
    assert adjust(SamplingParams(frequency_penalty=0.5), prompt, output) == [2, -2, 0, 0.5, 2.5]
    assert adjust(SamplingParams(repetition_penalty=2.0), prompt, output) == [1, -4, 0.5, 0.5, 1.5]
    assert adjust(SamplingParams(logit_bias={3: 4.0, 0: -1.0}), prompt, output) == [1, -2, 1, 4.5, 3]
    # Bias comes first, so the repetition penalty sees the biased logit.
    both = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={2: -3.0})
    assert adjust(both, prompt, output) == [1, -4, -5, 0.5, 0.5]


def test_drafted_tokens_count_like_generated_ones() -> None:
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.3, min_new_tokens=4)
    tokens, drafted, ends = [0, 1, 2, 2, 4], [2, 3, 3], frozenset({1})
    rows = [Prefix(params, tokens, 2, ends, drafted[:n]) for n in range(4)]
    whole = [Prefix(params, tokens + drafted[:n], 2, ends) for n in range(4)]
    assert torch.equal(adjusted_logits(LOGITS.repeat(4, 1), rows), adjusted_logits(LOGITS.repeat(4, 1), whole))


def test_end_tokens_are_impossible_before_the_minimum() -> None:
    params = SamplingParams(min_new_tokens=2)
    for length in range(4):
        row = adjust(params, [0], [3] * length, end_ids=(1, 4))
        banned = length < 2
        assert [x == -torch.inf for x in row] == [False, banned, False, False, banned]


def test_repetition_equals_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 3
    prefixes = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    for penalty in (0.7, 1.3):
        rows = [Prefix(SamplingParams(repetition_penalty=penalty), p.tolist(), 5) for p in prefixes]
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(prefixes, logits)
        torch.testing.assert_close(adjusted_logits(logits, rows), expected)


SETTINGS = [
    SamplingParams(),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.7),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(logit_bias={2: 3.0, 9: -100.0}),
    SamplingParams(min_new_tokens=3),
    SamplingParams(0, 0, 1.0, 0.0, None, 9, False, (), -0.5, 0.3, 0.8, {1: 1.0}, 6),
]


def test_a_mixed_batch_equals_the_naive_version_row_by_row() -> None:
    """Exactly: a row's values do not depend on its neighbours. The input is left alone."""
    generator = torch.Generator().manual_seed(2)
    end_ids = frozenset({0, 7})
    logits = torch.randn(len(SETTINGS) * 5, 10, generator=generator, dtype=torch.float64)
    prefixes = [
        Prefix(params, torch.randint(0, 10, (length,), generator=generator).tolist(), min(length, 3), end_ids)
        for params in SETTINGS
        for length in (1, 3, 4, 7, 20)
    ]
    before = logits.clone()
    together = adjusted_logits(logits, prefixes)
    assert logits.equal(before)
    for row, prefix in enumerate(prefixes):
        expected = naive_adjusted(logits[row], prefix.params, prefix.token_ids, prefix.prompt_length, end_ids)
        torch.testing.assert_close(together[row], expected, rtol=1e-14, atol=1e-14)
        assert together[row].equal(adjusted_logits(logits[row : row + 1], [prefix])[0])


def test_costs_nothing_where_nobody_asks() -> None:
    assert adjusted_logits(LOGITS, []) is LOGITS
    assert adjusted_logits(LOGITS, [Prefix(SamplingParams(0.7, top_k=3), [1], 1)]) is LOGITS


# ---- the exact law: the target's distribution after a drafted prefix counts the drafted tokens

VOCAB, PROMPT, END = 3, (1, 0), frozenset({2})


def adjusted_target(params: SamplingParams) -> Target:
    """Logits are the logarithms of a random target; the real functions make its distribution of them."""
    raw = random_target(11, VOCAB)

    @cache
    def target(prefix: Tokens) -> Tensor:
        rows = [Prefix(params, [*PROMPT, *prefix], len(PROMPT), END)]
        logits = adjusted_logits(raw(prefix).log()[None], rows)
        values = (params.temperature, params.top_k, params.top_p, params.min_p)
        return truncated_probs(logits, *(torch.tensor([value]) for value in values))[0]

    return target


LAWS = {
    "presence and frequency": SamplingParams(1.0, presence_penalty=0.8, frequency_penalty=0.6),
    "repetition": SamplingParams(0.7, repetition_penalty=1.7),
    "bias": SamplingParams(1.0, logit_bias={0: 1.5, 1: -2.0}),
    "minimum": SamplingParams(1.0, min_new_tokens=2),
    "all": SamplingParams(
        1.3,
        top_k=2,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=-0.5,
        frequency_penalty=1.1,
        repetition_penalty=1.2,
        logit_bias={2: 0.5},
        min_new_tokens=1,
    ),
    "greedy": SamplingParams(0.0, presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.5),
}


@pytest.mark.parametrize("law", LAWS)
def test_law_is_the_targets(law: str) -> None:
    target = adjusted_target(LAWS[law])
    request = Request(target, random_drafter(3, VOCAB), confidence=random_confidence(7))
    for choose in (fixed_length(2), drawn_beforehand(2), threshold(0.4)):
        found = joint_law([request], 2, choose, 4)
        assert total_variation(found, target_law([request], 4)) <= 1e-12


def test_penalties_that_forget_the_drafted_part_are_caught() -> None:
    """Every row of a round adjusted by the committed prefix alone: the law is another one."""
    params = LAWS["presence and frequency"]
    target, raw = adjusted_target(params), random_target(11, VOCAB)

    def forgetful(committed: int) -> Target:
        def probs(prefix: Tokens) -> Tensor:
            rows = [Prefix(params, [*PROMPT, *prefix[:committed]], len(PROMPT), END)]
            return adjusted_logits(raw(prefix).log()[None], rows).softmax(-1)[0]

        return probs

    # One round of two slots from the empty output: slots 1 and 2 and the bonus row all count nothing.
    request = Request(forgetful(0), random_drafter(3, VOCAB))
    assert (
        total_variation(joint_law([request], 2, fixed_length(2), 3), target_law([Request(target, request.drafter)], 3))
        > 1e-3
    )
