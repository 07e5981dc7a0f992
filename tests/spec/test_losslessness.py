"""The output of speculative decoding follows the target exactly: enumerated, then sampled through `verify`.

The same comparisons must fail for verifiers, drafters and schedulers that are subtly wrong.

Shapes: R = requests, G = slots of a block, V = vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark.draws import Purpose, uniforms
from dspark.sampling import categorical, truncated_probs
from dspark.spec.draft import Draft
from dspark.spec.verify import verify
from tests.spec.exact import (
    ChooseLengths,
    Request,
    Round,
    Rules,
    Target,
    Tokens,
    adversarial_drafter,
    certain_drafter,
    drawn_beforehand,
    fixed_length,
    joint_law,
    perfect_drafter,
    random_confidence,
    random_drafter,
    random_target,
    target_law,
    threshold,
    total_variation,
)

VOCAB = 3


def distance(
    *requests: Request, choose: ChooseLengths, gamma: int = 2, num_tokens: int = 3, rules: Rules | None = None
) -> float:
    law = joint_law(list(requests), gamma, choose, num_tokens, rules or Rules())
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return total_variation(law, target_law(list(requests), num_tokens))


def truncated_target(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Target:
    """Logits are the logarithms of a random target; the request's own parameters make its distribution."""
    raw = random_target(11, VOCAB)

    @cache
    def target(prefix: Tokens) -> Tensor:
        parameters = [torch.tensor([value]) for value in (temperature, top_k, top_p, min_p)]
        return truncated_probs(raw(prefix).log()[None], *parameters)[0]

    return target


TARGETS = {
    "random": random_target(1, VOCAB),
    "zeros": random_target(2, VOCAB, zeros=1),
    "truncated": truncated_target(0.8, top_k=2, top_p=0.9, min_p=0.05),
    "greedy": truncated_target(0.0),
}
DRAFTERS = {
    "random": lambda target: random_drafter(3, VOCAB),
    "zeros": lambda target: random_drafter(4, VOCAB, zeros=1),
    "pruned": lambda target: random_drafter(5, VOCAB, support_size=2),
    "certain": lambda target: certain_drafter(6, VOCAB),
    "perfect": perfect_drafter,
    "adversarial": adversarial_drafter,
}
SCHEDULERS = {
    "length 0": fixed_length(0),
    "length 1": fixed_length(1),
    "length 2": fixed_length(2),
    "random length": drawn_beforehand(2),
    "threshold": threshold(0.4),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("target", TARGETS)
def test_law_is_the_targets(target: str, drafter: str, scheduler: str) -> None:
    request = Request(TARGETS[target], DRAFTERS[drafter](TARGETS[target]), confidence=random_confidence(7))
    assert distance(request, choose=SCHEDULERS[scheduler]) <= 1e-12


def test_longer_block() -> None:
    request = Request(random_target(1, 3), random_drafter(2, 3), confidence=random_confidence(3))
    for choose in (fixed_length(3), drawn_beforehand(3), threshold(0.3)):
        assert distance(request, choose=choose, gamma=3, num_tokens=4) <= 1e-12


def test_longer_output() -> None:
    request = Request(random_target(1, 4, zeros=1), random_drafter(2, 4, zeros=1))
    assert distance(request, choose=drawn_beforehand(2), num_tokens=4) <= 1e-12


def test_two_requests_together() -> None:
    requests = [
        Request(random_target(r, 2), random_drafter(10 + r, 2), confidence=random_confidence(r)) for r in (0, 1)
    ]
    for choose in (fixed_length(2), drawn_beforehand(2), threshold(0.5)):
        assert distance(*requests, choose=choose, num_tokens=3) <= 1e-12


def test_budget_from_past_confidences() -> None:
    """Draft tokens of the round before last may decide how many of today's are verified."""

    def stale(round: Round) -> dict[tuple[int, ...], float]:
        confident = len(round.past) < 2 or sum(map(sum, round.past[1][1])) > len(round.past[1][1])
        return {(2 if confident else 1,) * len(round.tokens): 1.0}

    requests = [
        Request(random_target(r, 2), random_drafter(10 + r, 2), confidence=random_confidence(r)) for r in (0, 1)
    ]
    law = joint_law(requests, 2, stale, 3, memory=2)
    assert total_variation(law, target_law(requests, 3)) <= 1e-12


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_law_is_one_sequence(drafter: str) -> None:
    target = TARGETS["greedy"]
    greedy: Tokens = ()
    for _ in range(4):
        greedy += (int(target(greedy).argmax()),)
    law = joint_law([Request(target, DRAFTERS[drafter](target))], 2, fixed_length(2), 4)
    assert law == {(greedy,): pytest.approx(1, abs=1e-12)}


# ---- what the enumeration must catch

HONEST = Request(TARGETS["random"], DRAFTERS["random"](TARGETS["random"]), confidence=random_confidence(7))


def test_catches_a_forgotten_residual() -> None:
    rules = Rules(residual=lambda target_probs, support, draft_probs, prefix_probs: target_probs)
    assert distance(HONEST, choose=fixed_length(2), rules=rules) > 1e-3


def test_catches_draft_probs_that_were_not_sampled_from() -> None:
    """The drafter samples from its two best tokens, the verifier is told of the distribution before that."""

    def truncated(prefix: Tokens, block: Tokens) -> tuple[Tensor, Tensor]:
        support, draft_probs = HONEST.drafter(prefix, block)
        best = draft_probs.topk(2).indices
        return support[best], draft_probs[best] / draft_probs[best].sum()

    honest = replace(HONEST, drafter=truncated)
    assert distance(honest, choose=fixed_length(2)) <= 1e-12
    assert distance(replace(honest, claimed=HONEST.drafter), choose=fixed_length(2)) > 1e-3


def test_catches_greedy_acceptance_at_temperature_1() -> None:
    rules = Rules(
        ratios=lambda target_probs, tokens, support, draft_probs: (target_probs.argmax(-1) == tokens).double(),
        ending=lambda target_probs, support, draft_probs, prefix_probs: prefix_probs,
        residual=lambda target_probs, support, draft_probs, prefix_probs: target_probs,
    )
    assert distance(HONEST, choose=fixed_length(2), rules=rules) > 1e-3


def test_catches_a_round_that_ends_as_likely_as_its_prefix_stays() -> None:
    """The chance to end before a slot must allow for the tokens that may still stay after it."""
    rules = Rules(ending=lambda target_probs, support, draft_probs, prefix_probs: prefix_probs)
    assert distance(HONEST, choose=fixed_length(1), rules=rules) <= 1e-12
    assert distance(HONEST, choose=fixed_length(2), rules=rules) > 1e-3


def test_catches_a_scheduler_that_looks_at_the_token_it_decides_on() -> None:
    def peek(round: Round) -> dict[tuple[int, ...], float]:
        return {tuple(1 if tokens[0] == 0 else 0 for tokens in round.tokens): 1.0}

    assert distance(HONEST, choose=peek) > 1e-3


def test_catches_a_scheduler_that_uses_a_later_slots_confidence() -> None:
    """Slot 2's confidence depends on the token in slot 1, so slot 1 may not be decided by it."""

    def look_ahead(round: Round) -> dict[tuple[int, ...], float]:
        return {tuple(1 if slots[1] >= 0.5 else 0 for slots in round.confidences): 1.0}

    assert distance(HONEST, choose=look_ahead) > 1e-3


# ---- sampled, through `verify` and the seeded draws

G = 3
GENERATOR = np.random.default_rng(5)
TARGET_TABLE = torch.from_numpy(GENERATOR.dirichlet(np.full(VOCAB, 3.0), VOCAB)).float()  # [previous, V]
DRAFT_TABLE = torch.from_numpy(GENERATOR.dirichlet(np.full(VOCAB, 1.0), (G, VOCAB))).float()  # [G, previous, V]


def decode(
    num_requests: int, num_tokens: int, sharpening: float = 1.0, accept_slots: Sequence[int] = range(G)
) -> Tensor:
    """Outputs [R, num_tokens] of first-order Markov tables, in one batch, with random verify lengths.

    With a sharpening other than 1 the draft tokens are not drawn from the draft_probs that are handed on. Where
    accept_slots repeat, a position's acceptance draw is that of an earlier round.
    """
    every = torch.arange(num_requests)
    seeds = every.numpy()
    lengths_generator = np.random.default_rng(0)
    outputs = torch.zeros(num_requests, num_tokens * (G + 1) + 1, dtype=torch.int64)  # column 0: the first anchor
    anchors = torch.zeros(num_requests, dtype=torch.int64)
    for _ in range(num_tokens):  # rounds: each commits a token or more
        positions = anchors[:, None] + 1 + torch.arange(G + 1)  # [R, G + 1]
        block = outputs[every, anchors][:, None]  # the anchor, then the draft tokens
        for k in range(G):
            u = torch.from_numpy(uniforms(seeds, positions[:, k], Purpose.DRAFT, k))
            token = categorical(DRAFT_TABLE[k, block[:, k]] ** sharpening, u)
            block = torch.cat([block, token[:, None]], dim=1)
        draft = Draft(
            tokens=block[:, 1:],
            support=torch.arange(VOCAB).expand(num_requests, G, VOCAB),
            draft_probs=DRAFT_TABLE[torch.arange(G), block[:, :G]],
            lengths=torch.full((num_requests,), G),
            signals=torch.zeros(num_requests, G, 1),
        )

        lengths = torch.from_numpy(lengths_generator.integers(0, G + 1, num_requests))
        request, slot = (torch.arange(G + 1) <= lengths[:, None]).nonzero(as_tuple=True)
        verdict = verify(
            TARGET_TABLE[block[request, slot]],
            draft,
            lengths,
            torch.from_numpy(uniforms(seeds[:, None], positions[:, :G], Purpose.ACCEPT, accept_slots)),
            torch.from_numpy(uniforms(seeds[:, None], positions, Purpose.TARGET)),
        )

        # What is written past the committed tokens, later rounds overwrite.
        outputs.scatter_(1, positions[:, :G], draft.tokens)
        anchors = anchors + verdict.accepted + 1
        outputs[every, anchors] = verdict.next_token
    return outputs[:, 1 : num_tokens + 1]


def p_value(outputs: Tensor) -> float:
    """Chi-square of the joint law of three tokens against the target's."""
    first, second, third = outputs.T
    observed = torch.bincount((first * VOCAB + second) * VOCAB + third, minlength=VOCAB**3)
    table = TARGET_TABLE.double()
    expected = (table[0][:, None, None] * table[:, :, None] * table[None]).flatten()
    expected = expected / expected.sum() * len(outputs)
    assert expected.min() > 5
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


def test_sampled_rounds_follow_the_target() -> None:
    assert p_value(decode(20_000, 3)) > 1e-3


def test_sampling_catches_draft_probs_that_were_not_sampled_from() -> None:
    assert p_value(decode(20_000, 3, sharpening=1.5)) < 1e-6


def test_sampling_catches_acceptance_draws_that_are_used_again() -> None:
    """A draw by which a longer prefix did not stay is known: by position alone the next round would meet it again."""
    assert p_value(decode(400_000, 3)) > 1e-3
    assert p_value(decode(400_000, 3, accept_slots=[0] * G)) < 1e-6
