"""More requests than memory: regions grow, move, are taken away; every request still ends with its own output."""

import itertools
import random

import pytest

from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.sequence import Sequence
from dspark.sampling import SamplingParams
from tests.tiny import AdversarialDrafter, OracleDrafter, memory_for, tiny_drafter, tiny_target

TARGET = tiny_target()
ADVERSARIAL, ORACLE = AdversarialDrafter(TARGET), OracleDrafter(TARGET)  # slow, but they remember what they computed
DRAFTERS = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET),
    "adversarial": lambda: ADVERSARIAL,
    "identical": lambda: ORACLE,
}
GREEDY = SamplingParams(max_new_tokens=24)
SEEDED = SamplingParams(0.9, top_p=0.95, seed=11, max_new_tokens=24)


def make_engine(drafter: str, num_slots: int = 10_000, growth: int = 4, reuse: bool = True, **limits: int) -> Engine:
    """An engine with an arena of exactly num_slots, unless streams and their length ask for less."""
    made = DRAFTERS[drafter]()
    limits = {"max_streams": 8, "max_model_len": 96, **limits}
    engine = Engine(
        TARGET, made, config=EngineConfig(kv_gib=memory_for(num_slots, TARGET, made), reuse_prefixes=reuse, **limits)
    )
    engine.scheduler.growth = growth
    return engine


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    assert engine.cache.used_slots == 0


def course(sequence: Sequence) -> tuple[list[int], int, int, str | None]:
    return sequence.output_ids, sequence.rounds, sequence.accepted_tokens, sequence.finish_reason


def alone(drafter: str, prompt: list[int], params: SamplingParams) -> tuple[list[int], int, int, str | None]:
    engine = make_engine(drafter)
    sequence = engine.add(prompt, params)
    finish(engine)
    return course(sequence)


def test_growth_in_place_moves_and_preemption_all_happen():
    """In this order: into free slots behind, then past a neighbour, then at a younger one's cost."""
    engine = make_engine("none", 56, max_streams=2)
    counters = engine.counters
    many, few = SamplingParams(max_new_tokens=34), SamplingParams(max_new_tokens=25)
    old = engine.add([1] * 10, many)
    for _ in range(6):
        engine.step()
    assert (counters.growths, counters.moves, counters.preemptions) == (1, 0, 0)
    young = engine.add([2] * 5, few)
    engine.step()
    assert young.first_slot == old.first_slot + old.kv.capacity == 19, "there is no room for all that both can need"
    while not counters.moves:
        engine.step()
    assert (old.first_slot, counters.preemptions) == (19 + young.kv.capacity, 0)
    while not counters.preemptions:
        engine.step()
    assert engine.scheduler.running == [old] and list(engine.scheduler.waiting) == [young]
    assert young.output_ids and young.finish_reason is None
    finish(engine)
    assert course(old) == alone("none", [1] * 10, many)
    assert course(young) == alone("none", [2] * 5, few)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_preempted_request_goes_on_as_if_nothing_had_been(drafter: str, params: SamplingParams, reuse: bool):
    """After a chunk of the prompt and after every step that emitted; rounds are counted as without preemption."""
    prompt = [5, 6, 7] * 6
    engine = make_engine(drafter, reuse=reuse, prefill_tokens=7)
    sequence = engine.add(prompt, params)
    seen: list[int] = []
    for step in itertools.count():
        if not engine.has_work:
            break
        new_tokens = engine.step()
        seen += [token for new in new_tokens for token in new.token_ids]
        assert seen == sequence.output_ids, "every token is emitted once"
        if (new_tokens or step == 1) and sequence.finish_reason is None:
            engine.scheduler.preempt()
            assert sequence.region is None and engine.cache.used_slots == 0
    assert course(sequence) == alone(drafter, prompt, params)
    assert engine.counters.preemptions > 3
    if not reuse:
        assert engine.counters.computed_prompt_tokens > 3 * len(prompt)


@pytest.mark.parametrize("drafter", ["none", "random"])
def test_many_requests_through_a_tiny_arena(drafter: str):
    """200 requests, an arena for about two; the bound holds at every moment and each gets what it gets alone."""
    rng = random.Random(1)
    engine = make_engine(drafter, 60, max_streams=5, prefill_tokens=16)
    assert engine.cache.num_slots == 60
    requests: list[tuple[list[int], SamplingParams]] = []
    for i in range(200):
        prompt = rng.choice([[], [3] * 17, [3] * 20]) + [rng.randrange(64) for _ in range(rng.randrange(1, 14))]
        params = SamplingParams(rng.choice([0.0, 0.8]), seed=i, max_new_tokens=rng.randrange(1, 20))
        requests.append((prompt, params))
    sequences: list[Sequence] = []
    while engine.has_work or len(sequences) < 200:
        for prompt, params in requests[len(sequences) : len(sequences) + rng.randrange(4)]:
            sequences.append(engine.add(prompt, params))
        if engine.has_work:
            engine.step()
            engine.scheduler.check_integrity()
    assert all(len(s.output_ids) == s.params.max_new_tokens for s in sequences)
    assert min(engine.counters.growths, engine.counters.moves, engine.counters.preemptions) > 0
    assert engine.counters.reused_tokens > 0
    large = make_engine(drafter, max_streams=1, reuse=False)
    for (prompt, params), sequence in list(zip(requests, sequences))[::5]:
        reference = large.add(prompt, params)
        finish(large)
        assert course(sequence) == course(reference)


def test_the_youngest_is_not_starved_by_those_that_come_after_it():
    """While short requests keep arriving, a preempted one comes back before any of them starts."""
    engine = make_engine("none", 50, max_streams=4)
    old, young = (engine.add([i] * 10, SamplingParams(max_new_tokens=36)) for i in (1, 2))
    later: list[Sequence] = []
    while young.finish_reason is None:
        assert engine.times.rounds < 100
        later.append(engine.add([4, len(later) % 64], SamplingParams(max_new_tokens=2)))
        engine.step()
        engine.scheduler.check_integrity()  # nobody runs before one that came earlier
    assert engine.counters.preemptions > 0
    assert old.finish_reason == "length"
    finish(engine)
    assert all(s.finish_reason == "length" for s in later)


def test_a_request_of_the_greatest_length_fits_beside_others():
    engine = make_engine("random", 64, max_streams=4)
    assert engine.longest_request == 60
    sequences = [engine.add([i] * 20, SamplingParams(max_new_tokens=40)) for i in range(3)]
    finish(engine)
    for i, sequence in enumerate(sequences):
        assert course(sequence) == alone("random", [i] * 20, SamplingParams(max_new_tokens=40))


def test_cancel_at_any_moment():
    """Waiting, in prefill, decoding, preempted; twice does nothing; those beside it go on."""
    for moment in range(12):
        engine = make_engine("random", 60, max_streams=3, prefill_tokens=6)
        sequences = [engine.add([i] * 15, GREEDY) for i in range(4)]
        for _ in range(moment):
            engine.step()
        if moment % 2 and engine.scheduler.running:
            engine.scheduler.preempt()
        cancelled = sequences[moment % 4]
        for _ in range(2):
            engine.cancel(cancelled)
            engine.scheduler.check_integrity()
        output = cancelled.output_ids
        finish(engine)
        engine.cancel(cancelled)
        assert (cancelled.output_ids, cancelled.finish_reason) == (output, "cancelled")
        for i, sequence in enumerate(sequences):
            expected = alone("random", [i] * 15, GREEDY)
            if sequence is cancelled:
                assert output == expected[0][: len(output)]
            else:
                assert course(sequence) == expected
