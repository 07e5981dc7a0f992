"""At temperature 1 the engine's tokens follow the target's exact joint law: sampled through the real batched path.

`tests/spec` proves the algorithm by enumeration; here a seeded chi-square test holds the engine to the same law.
"""

from collections import Counter
from itertools import product

import pytest
from scipy.stats import chisquare
from torch import Tensor

import dspark.drafters.dspark
import dspark.spec.verify
from dspark.drafters.interface import Drafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength
from tests.tiny import AdversarialDrafter, PlainTarget, tiny_drafter, tiny_target

VOCAB, OUTPUT = 6, 4  # the prompt gives one token, a round of up to two draft tokens the others
REQUESTS, STREAMS = 2048, 64
PROMPT = (2, 5, 1)
TARGET = tiny_target(seed=3, vocab_size=VOCAB, num_layers=1)
PLAIN = PlainTarget(TARGET)


def p_value(drafter: Drafter | None, **filters: float) -> float:
    """Of the outputs of REQUESTS requests against the joint law; rare outputs are counted together."""
    engine = Engine(TARGET, drafter, config=EngineConfig(STREAMS, 32))
    params = [SamplingParams(1.0, seed=i, max_new_tokens=OUTPUT, **filters) for i in range(REQUESTS)]  # pyright: ignore
    sequences = [engine.add(list(PROMPT), p) for p in params]
    while engine.has_work:
        engine.step()
    counts = Counter(tuple(s.output_ids) for s in sequences)
    law: dict[tuple[int, ...], float] = {}
    for output in product(range(VOCAB), repeat=OUTPUT):
        law[output] = 1.0
        for i, token in enumerate(output):
            law[output] *= float(PLAIN.probs(PROMPT + output[:i], params[0])[token]) if law[output] else 0
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    assert all(law[output] > 0 for output in counts), "a token that the target never emits"
    common = [output for output in law if law[output] * REQUESTS >= 5]
    observed = [counts[output] for output in common]
    expected = [law[output] * REQUESTS for output in common]
    if REQUESTS - sum(expected) >= 5:
        observed.append(REQUESTS - sum(observed))
        expected.append(REQUESTS - sum(expected))
    scale = sum(observed) / sum(expected)
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


DRAFTERS = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET, 1, block_size=2, num_layers=1),
    "pruned": lambda: tiny_drafter(TARGET, 1, block_size=2, draft_vocab_size=4, num_layers=1),
    "adversarial": lambda: AdversarialDrafter(TARGET, 2),
}


@pytest.mark.parametrize("drafter", ["none", "random", "adversarial"])
def test_output_follows_the_joint_law(drafter: str):
    assert p_value(DRAFTERS[drafter]()) > 1e-3


def test_output_follows_the_joint_law_with_few_candidates(monkeypatch: pytest.MonkeyPatch):
    """Drafts over a pruned vocabulary, and there from the best candidates only."""
    monkeypatch.setattr(dspark.drafters.dspark, "NUM_CANDIDATES", 3)
    assert p_value(DRAFTERS["pruned"]()) > 1e-3


def test_output_follows_the_truncated_law():
    assert p_value(DRAFTERS["random"](), top_k=4, top_p=0.9, min_p=0.02) > 1e-3


@pytest.mark.parametrize("drafter", ["random", "adversarial"])
def test_a_wrong_residual_is_caught(drafter: str, monkeypatch: pytest.MonkeyPatch):
    """The power of the test: a rejected token replaced by a sample of the target's own distribution."""

    def wrong(target_probs: Tensor, support: Tensor, draft_probs: Tensor) -> Tensor:
        return target_probs

    monkeypatch.setattr(dspark.spec.verify, "residual_probs", wrong)
    assert p_value(DRAFTERS[drafter]()) < 1e-6


def test_probabilities_that_were_not_sampled_from_are_caught(monkeypatch: pytest.MonkeyPatch):
    """A drafter that reports another distribution than the one it drew from breaks the law, and the test sees it."""
    drafter = DRAFTERS["random"]()
    decode_block = drafter.decode_block

    def dishonest(*args):
        draft = decode_block(*args)
        draft.draft_probs = draft.draft_probs.sqrt() / draft.draft_probs.sqrt().sum(-1, keepdim=True)
        return draft

    monkeypatch.setattr(drafter, "decode_block", dishonest)
    assert p_value(drafter) < 1e-6


@pytest.mark.parametrize("drafter", [None, "random", "adversarial"])
def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(drafter: str | None):
    """Its tokens come from its seed and its own prefix; greedy and sampled neighbours join at other moments."""
    target = tiny_target()
    make = {
        None: lambda: None,
        "random": lambda: tiny_drafter(target),
        "adversarial": lambda: AdversarialDrafter(target),
    }[drafter]
    params = SamplingParams(0.8, top_p=0.95, seed=123, max_new_tokens=24)
    outputs = []
    for neighbours in (0, 15):
        engine = Engine(target, make(), FixedLength(3), config=EngineConfig(16, 96, prefill_tokens=16))
        crowd = [SamplingParams((i % 3) / 2, seed=i, max_new_tokens=10 + i) for i in range(neighbours)]
        for i, p in enumerate(crowd[:7]):
            engine.add([i + 1, 2, 3 + i], p)
        sequence = engine.add([9, 8, 7, 6], params)
        for i, p in enumerate(crowd[7:]):
            engine.step()
            engine.add([i + 30, 5], p)
        while engine.has_work:
            engine.step()
        outputs.append(sequence.output_ids)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 24
