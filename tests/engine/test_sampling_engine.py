"""A request's random draws depend on its seed and positions only: in fp32 its tokens are the same in any company."""

import random

import pytest

from dspark.drafters.load import bind
from dspark.engine.engine import Engine, EngineConfig
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength, PrefixScheduler, Threshold
from tests.tiny import AdversarialDrafter, tiny_drafter, tiny_target, tiny_variant

TARGET = tiny_target()
DRAFTERS = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET),
    "adversarial": lambda: AdversarialDrafter(TARGET),
}
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "min_new_tokens": 4},
    {"temperature": 1.0, "top_k": 12, "frequency_penalty": 0.7, "presence_penalty": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.2, "logit_bias": {3: 2.0}},
]


def request(index: int) -> tuple[list[int], SamplingParams]:
    rng = random.Random(index)
    prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 20))]
    return prompt, SamplingParams(seed=index, max_new_tokens=6 + index % 17, **SETTINGS[index % len(SETTINGS)])


def answers(drafter: str, order: list[int], pause: int = 0) -> dict[int, list[int]]:
    """Tokens of these requests, submitted in this order with `pause` steps between them."""
    engine = Engine(TARGET, DRAFTERS[drafter](), FixedLength(3), config=EngineConfig(32, 64, prefill_tokens=24))
    sequences = {}
    for index in order:
        sequences[index] = engine.add(*request(index))
        for _ in range(pause):
            engine.step()
    while engine.has_work:
        engine.step()
    return {index: sequence.output_ids for index, sequence in sequences.items()}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seeded_request_is_the_same_alone_and_among_31_others(drafter: str):
    """Settings of all kinds side by side, in any order of submission, at once or one after the other."""
    everyone = list(range(32))
    together = answers(drafter, everyone)
    assert answers(drafter, everyone[::-1]) == together
    assert answers(drafter, random.Random(0).sample(everyone, 32), pause=1) == together
    for index in range(10):
        assert answers(drafter, [index])[index] == together[index]
    assert len({tuple(tokens) for tokens in together.values()}) == 32


@pytest.mark.parametrize("policy", [FixedLength(1), FixedLength(4), Threshold(0.2)])
def test_a_seeded_text_does_not_depend_on_drafter_or_policy(policy: PrefixScheduler):
    """Verified with draws of its own it would: what was verified decides which draw gives a token."""
    engine = Engine(TARGET, tiny_drafter(TARGET), policy, config=EngineConfig(32, 64))
    sequences = [engine.add(*request(index)) for index in range(32)]
    while engine.has_work:
        engine.step()
    assert {i: s.output_ids for i, s in enumerate(sequences)} == answers("none", list(range(32)))


@pytest.mark.parametrize("variant", ["feature input", "copy head", "eagle3", "mtp"])
@pytest.mark.parametrize("seed", [None, 5])
def test_parameters_at_the_edge_of_what_fp32_holds(variant: str, seed: int | None):
    """One such request used to stop the engine for all: top_p became 0 and left no candidate to draw."""
    drafter = bind(tiny_variant(variant, TARGET), TARGET)
    engine = Engine(TARGET, drafter, FixedLength(drafter.block_size), config=EngineConfig(8, 64, seed=0))
    extremes = [
        {"temperature": 1.0, "top_p": 1e-46},
        {"temperature": 1e-46, "top_p": 0.5},
        {"temperature": 1e30, "min_new_tokens": 4},
        {"temperature": 1.0, "repetition_penalty": 1e-3, "top_k": 2**31 - 1},
        {"temperature": 1.0, "min_p": 1 - 1e-12, "repetition_penalty": 1e3},
    ]
    sequences = [engine.add([1, 2, 3], SamplingParams(seed=seed, max_new_tokens=9, **extreme)) for extreme in extremes]
    while engine.has_work:
        engine.step()
    assert [len(s.output_ids) for s in sequences] == [9] * len(extremes)
    greedy = engine.add([1, 2, 3], SamplingParams(max_new_tokens=9))
    while engine.has_work:
        engine.step()
    assert sequences[0].output_ids == sequences[1].output_ids == greedy.output_ids


def test_nothing_is_drafted_for_a_last_token():
    """Nothing of it could be verified, and a policy that waits for news of its drafts would draft for ever."""
    engine = Engine(TARGET, tiny_drafter(TARGET), FixedLength(4), config=EngineConfig(8, 64))
    sequences = [engine.add([1, 2, index], SamplingParams(max_new_tokens=2)) for index in range(5)]
    while engine.has_work:
        engine.step()
    assert engine.step() == [] and engine.times.drafted == 0
    assert [len(s.output_ids) for s in sequences] == [2] * 5
