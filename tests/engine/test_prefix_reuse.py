"""Leading tokens that another request computed are copied: fewer are computed, nothing else changes."""

import random

import pytest

from dspark.drafters.bound import BoundDrafter
from dspark.drafters.interface import DraftRequest
from dspark.drafters.load import bind
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.sequence import Sequence
from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft
from tests.tiny import VARIANTS, tiny_target, tiny_variant

TARGET = tiny_target()
SHARED = [random.Random(0).randrange(64) for _ in range(40)]
GREEDY = SamplingParams(max_new_tokens=16)
SEEDED = SamplingParams(0.9, seed=5, max_new_tokens=16)


def make_engine(reuse: bool = True, drafter: str | None = "dspark", **limits: int) -> Engine:
    config = EngineConfig(**{"max_streams": 8, "max_model_len": 96, "reuse_prefixes": reuse, **limits})  # pyright: ignore
    return Engine(TARGET, bind(tiny_variant(drafter, TARGET), TARGET) if drafter else None, config=config)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()


def run(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> Sequence:
    sequence = engine.add(prompt, params)
    finish(engine)
    return sequence


def same_course(a: Sequence, b: Sequence) -> bool:
    """Same tokens, by the same rounds: the drafter too saw the same."""
    return (a.output_ids, a.rounds, a.accepted_tokens) == (b.output_ids, b.rounds, b.accepted_tokens)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("drafter", [None, *VARIANTS])
def test_what_a_finished_request_computed_is_not_computed_again(params: SamplingParams, drafter: str | None):
    engine = make_engine(drafter=drafter)
    first = run(engine, SHARED + [1, 2, 3], params)
    assert (engine.counters.reused_tokens, engine.counters.computed_prompt_tokens) == (0, 43)
    prompts = [SHARED + [1, 2, 3], SHARED + [4, 5], SHARED + [1, 2, 3] + first.output_ids + [7]]
    for prompt, known in zip(prompts, [42, 40, 43 + 15]):  # the last token of an answer is never computed
        before = engine.counters.reused_tokens
        again = run(engine, prompt, params)
        assert engine.counters.reused_tokens - before == known
        assert same_course(again, run(make_engine(False, drafter), prompt, params))
    assert engine.counters.computed_prompt_tokens == 43 + 1 + 2 + 2
    assert engine.cache.used_slots == 0


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_running_request_lends_what_it_has_computed_so_far(params: SamplingParams):
    engine = make_engine(prefill_tokens=30)
    lender = engine.add(SHARED, params)
    engine.step()
    borrower = engine.add(SHARED + [9], params)
    engine.step()
    assert engine.counters.reused_tokens == 30
    finish(engine)
    assert same_course(lender, run(make_engine(False), SHARED, params))
    assert same_course(borrower, run(make_engine(False), SHARED + [9], params))


@pytest.mark.parametrize("drafter", VARIANTS)
def test_the_drafters_storage_is_copied_too(drafter: str, monkeypatch: pytest.MonkeyPatch):
    """Without its part of the copy it would guess from whatever lies there, and guess something else."""

    def guesses(reuse: bool) -> list[list[int]]:
        engine, seen = make_engine(reuse, drafter), []
        assert engine.drafter is not None
        for storage in engine.drafter._storage:  # pyright: ignore
            storage.zero_()  # so that a forgotten copy leaves numbers there
        propose = engine.drafter.propose

        def watched(requests: list[DraftRequest], slots: int) -> Draft:
            seen.extend((draft := propose(requests, slots)).tokens.tolist())
            return draft

        monkeypatch.setattr(engine.drafter, "propose", watched)
        for i in range(4):
            run(engine, [3 * i] * 50)  # its context lies where later copies go
            run(engine, SHARED + [i], SEEDED)
        return seen

    expected = guesses(False)
    assert guesses(True) == expected
    monkeypatch.setattr(BoundDrafter, "copy", lambda *_: None)
    assert guesses(True) != expected, "the test sees a copy that was forgotten"


def test_short_prefixes_and_engines_without_reuse_compute_all():
    engine = make_engine()
    run(engine, SHARED[:15] + [1])
    run(engine, SHARED[:15] + [2, 3])
    assert engine.counters.reused_tokens == 0
    engine = make_engine(False)
    for _ in range(2):
        run(engine, SHARED)
    assert (engine.counters.reused_tokens, engine.counters.computed_prompt_tokens) == (0, 80)
    assert engine.cache.kept_slots == 0


def test_what_is_kept_gives_way_to_requests():
    """An arena of one request's size: what is kept never keeps anyone waiting, and still is reused."""
    engine = make_engine(max_streams=1)
    assert engine.cache.num_slots == 100
    for i in range(4):
        assert same_course(run(engine, [i] * 80), run(make_engine(False), [i] * 80))
        assert engine.cache.kept_slots <= engine.cache.num_slots
    run(engine, [3] * 90, SamplingParams(max_new_tokens=6))  # needs all slots, those it is copied from too
    assert engine.counters.reused_tokens >= 80


def test_a_cancelled_request_leaves_what_it_computed():
    engine = make_engine(prefill_tokens=25)
    cancelled = engine.add(SHARED, GREEDY)
    engine.step()
    engine.cancel(cancelled)
    assert (engine.cache.used_slots, engine.cache.kept_slots) == (0, 25)
    assert same_course(run(engine, SHARED), run(make_engine(False), SHARED))
    assert engine.counters.reused_tokens == 25
