"""At temperature 0 the engine's output is, token for token, that of the plainest loop, whatever the drafter."""

import random
from functools import cache
from typing import Any

import pytest
import torch

from dspark.drafters.interface import Drafter
from dspark.drafters.load import bind
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.sequence import Sequence
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength
from tests.tiny import AdversarialDrafter, OracleDrafter, plain_greedy, tiny_drafter, tiny_target, tiny_variant

TARGET = tiny_target()
NEW_TOKENS = 20
DRAFTERS = {
    "none": lambda: None,
    "ngram": lambda: NgramDrafter(4, min_ngram=1),
    "random": lambda: tiny_drafter(TARGET),
    "pruned": lambda: tiny_drafter(TARGET, draft_vocab_size=20),
    "copy head": lambda: bind(tiny_variant("copy head", TARGET), TARGET),
    "own position": lambda: bind(tiny_variant("own position", TARGET), TARGET),
    "windowed": lambda: bind(tiny_variant("dspark", TARGET, window=5), TARGET),
    "eagle3": lambda: bind(tiny_variant("eagle3", TARGET, draft_vocab_size=20), TARGET),
    "mtp": lambda: bind(tiny_variant("mtp", TARGET, window=5, block_size=1), TARGET),
    "adversarial": lambda: AdversarialDrafter(TARGET),
    "identical": lambda: OracleDrafter(TARGET),
}


def prompt(index: int) -> list[int]:
    """Lengths from 1 to 36; the fourth repeats itself, so that n-gram lookup finds something."""
    if index == 3:
        return [7] * 4
    rng = random.Random(index)
    return [rng.randrange(64) for _ in range((1, 12, 36, 4, 5, 23, 2, 17, 9)[index % 9])]


@cache
def expected(index: int, num_tokens: int = NEW_TOKENS) -> list[int]:
    return plain_greedy(TARGET, prompt(index), num_tokens)


def make_engine(drafter: Drafter | None, **limits: Any) -> Engine:
    return Engine(TARGET, drafter, config=EngineConfig(**{"max_streams": 8, "max_model_len": 96, **limits}))


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.cache.check_integrity()
    assert engine.cache.used_slots == 0


def greedy(num_tokens: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens)


@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_output_equals_the_plain_loop(drafter: str, streams: int):
    engine = make_engine(DRAFTERS[drafter]())
    sequences = [engine.add(prompt(i), greedy()) for i in range(streams)]
    run(engine)
    for i, sequence in enumerate(sequences):
        assert sequence.output_ids == expected(i)
        assert sequence.finish_reason == "length"


@pytest.mark.parametrize("prefill_tokens", [1, 5])
@pytest.mark.parametrize("drafter", ["none", "random", "eagle3", "adversarial"])
def test_prompts_computed_in_chunks_beside_decoding_requests(drafter: str, prefill_tokens: int):
    engine = make_engine(DRAFTERS[drafter](), prefill_tokens=prefill_tokens)
    sequences = [engine.add(prompt(i), greedy()) for i in range(5)]
    run(engine)
    assert [s.output_ids for s in sequences] == [expected(i) for i in range(5)]


@pytest.mark.parametrize("drafter", ["ngram", "random", "own position", "mtp", "adversarial", "identical"])
def test_requests_join_and_are_cancelled_between_steps(drafter: str):
    engine = make_engine(DRAFTERS[drafter](), max_streams=3, prefill_tokens=8)
    sequences: list[Sequence] = []
    cancelled = {1: 4, 4: 6, 5: 5}  # request -> step; 4 is cancelled while it waits or reads its prompt
    for step in range(400):
        if step % 2 == 0 and len(sequences) < 8:
            sequences.append(engine.add(prompt(len(sequences)), greedy()))
        for index, when in cancelled.items():
            if step == max(when, 2 * index + 1):
                engine.cancel(sequences[index])
        if not engine.has_work and len(sequences) == 8:
            break
        if engine.has_work:
            engine.step()
            engine.cache.check_integrity()
    assert engine.cache.used_slots == 0
    for i, sequence in enumerate(sequences):
        if sequence.finish_reason == "cancelled":
            assert i in cancelled
            assert sequence.output_ids == expected(i)[: len(sequence.output_ids)]
        else:
            assert sequence.output_ids == expected(i)
    assert sum(s.finish_reason == "cancelled" for s in sequences) >= 2


def test_a_region_used_before_holds_nothing_that_is_still_seen():
    """Requests take over the slots of finished ones, whose keys, values and drafter context lie there still."""
    engine = make_engine(tiny_drafter(TARGET), max_streams=1)
    for i in (2, 0, 5, 6):
        sequence = engine.add(prompt(i), greedy())
        run(engine)
        assert sequence.output_ids == expected(i)


def test_an_identical_drafter_is_never_rejected():
    block = 4
    engine = make_engine(OracleDrafter(TARGET, block))
    sequences = [engine.add(prompt(i), greedy(1 + 3 * (block + 1))) for i in (1, 2, 4)]
    run(engine)
    for sequence in sequences:
        assert sequence.accepted_tokens == 3 * block
        assert sequence.rounds == 3  # the first token comes out of the prompt


def test_an_adversarial_drafter_is_both_accepted_and_rejected():
    """Otherwise the tests above would not exercise the rollback."""
    engine = make_engine(AdversarialDrafter(TARGET))
    sequence = engine.add(prompt(1), greedy())
    run(engine)
    assert 0 < sequence.accepted_tokens < 4 * sequence.rounds


@pytest.mark.parametrize("length", [0, 1, 4])
def test_verify_lengths_do_not_change_the_output(length: int):
    engine = Engine(TARGET, AdversarialDrafter(TARGET), FixedLength(length), config=EngineConfig(8, 96))
    sequences = [engine.add(prompt(i), greedy()) for i in range(3)]
    run(engine)
    assert [s.output_ids for s in sequences] == [expected(i) for i in range(3)]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6])
def test_no_more_tokens_than_asked_for(num_tokens: int):
    """A round may accept more than the request has left: none of it is kept or even verified."""
    engine = make_engine(OracleDrafter(TARGET))
    sequence = engine.add(prompt(1), greedy(num_tokens))
    run(engine)
    assert sequence.output_ids == expected(1)[:num_tokens]


def test_an_end_token_inside_an_accepted_block_ends_the_request():
    answer = expected(1)
    stop = next(t for i, t in enumerate(answer) if i >= 3 and answer.index(t) == i)
    upto = answer.index(stop) + 1
    for eos_ids, params, length in (
        (frozenset({stop}), SamplingParams(max_new_tokens=NEW_TOKENS), upto),
        (frozenset({stop}), SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True), NEW_TOKENS),
        (frozenset(), SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=(stop,)), upto),
    ):
        engine = Engine(TARGET, OracleDrafter(TARGET), eos_ids=eos_ids, config=EngineConfig(8, 96))
        sequence = engine.add(prompt(1), params)
        run(engine)
        assert sequence.output_ids == answer[:length]
        assert sequence.finish_reason == ("stop" if length < NEW_TOKENS else "length")


@pytest.mark.parametrize("drafter", ["none", "random", "adversarial"])
def test_rolled_back_and_regenerated_the_same(drafter: str):
    """Rollback: forget half of the answer and its KV in mid-flight, go on, get the same tokens."""
    engine = make_engine(DRAFTERS[drafter]())
    other, sequence = engine.add(prompt(2), greedy()), engine.add(prompt(1), greedy())
    while len(sequence.output_ids) < 10:
        engine.step()
    del sequence.token_ids[len(prompt(1)) + 5 :]
    engine.cache.truncate(sequence.kv, len(sequence.token_ids) - 1)
    engine.cache.check_integrity()
    run(engine)
    assert sequence.output_ids == expected(1)
    assert other.output_ids == expected(2)


def test_bf16_streams_agree_with_each_other():
    """In bf16 no plain loop is the reference; with and without a drafter the engine still agrees here."""
    target = tiny_target(torch.bfloat16)
    outputs = []
    for drafter in (None, AdversarialDrafter(target)):
        engine = Engine(target, drafter, config=EngineConfig(8, 96))
        sequences = [engine.add(prompt(i), greedy()) for i in range(3)]
        run(engine)
        outputs.append([s.output_ids for s in sequences])
    assert outputs[0] == outputs[1]
