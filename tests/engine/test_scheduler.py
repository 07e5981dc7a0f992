"""Admission: no limit is ever exceeded, first come is first served, every request ends; bad requests are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.kv_cache import KVCache
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import Sequence
from dspark.sampling import SamplingParams
from tests.tiny import memory_for, tiny_config, tiny_drafter, tiny_target

DRAFT_SLOTS = 3
requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=20)


def advance(scheduler: Scheduler) -> list[Sequence]:
    """One step without a model: computes what is planned, appends one token each; the sequences planned."""
    plan = scheduler.schedule()
    for chunk in plan.chunks:
        sequence, reaches_anchor = chunk.sequence, chunk.reaches_anchor
        scheduler.cache.truncate(sequence.kv, sequence.num_computed + chunk.count)
        if reaches_anchor:
            sequence.append([0])
        if sequence.finish_reason is not None:
            scheduler.release(sequence)
    assert all(c.count == 1 for c in plan.decoding)
    assert sum(c.count for c in plan.prefill) <= scheduler.prefill_tokens
    assert len(plan.chunks) == len({c.sequence.request_id for c in plan.chunks}) <= scheduler.max_streams
    return [c.sequence for c in plan.chunks]


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(1, 5), st.integers(1, 16), st.integers(35, 90), st.integers(0, 10))
def test_limits_hold_and_every_request_finishes(
    shapes: list[tuple[int, int]], max_streams: int, prefill_tokens: int, num_slots: int, growth: int
):
    """Streams, prefill budget and KV slots are never exceeded; requests start in the order they came in."""
    cache = KVCache(tiny_config(num_layers=1), num_slots, torch.float32, torch.device("cpu"))
    scheduler = Scheduler(cache, max_streams, prefill_tokens, DRAFT_SLOTS, growth)
    sequences = [Sequence(i, [0] * n, SamplingParams(max_new_tokens=new), i) for i, (n, new) in enumerate(shapes)]
    for sequence in sequences:
        scheduler.add(sequence)
    started: list[int] = []
    oldest: dict[int, int] = {}  # request -> steps in which it was the oldest
    while scheduler.has_work:
        head = scheduler.running[0] if scheduler.running else scheduler.waiting[0]
        oldest[head.request_id] = oldest.get(head.request_id, 0) + 1
        assert oldest[head.request_id] <= len(head.token_ids) + head.remaining, "the oldest advances in every step"
        pending, outputs = head.num_pending, len(head.output_ids)
        assert head in advance(scheduler), "the oldest works in every step"
        assert head.num_pending < pending or len(head.output_ids) > outputs
        scheduler.check_integrity()
        assert cache.used_slots <= num_slots
        assert len(scheduler.running) <= max_streams
        waiting = {s.request_id for s in scheduler.waiting}
        started += [s.request_id for s in sequences if s.request_id not in waiting and s.request_id not in started]
        assert started == list(range(len(started)))
    assert cache.used_slots == 0
    assert [(s.finish_reason, len(s.output_ids)) for s in sequences] == [("length", new) for _, new in shapes]


def test_decoding_requests_never_wait_for_prompts():
    """A long prompt takes many steps; those that decode get a token in each of them."""
    cache = KVCache(tiny_config(num_layers=1), 200, torch.float32, torch.device("cpu"))
    scheduler = Scheduler(cache, 4, 2, DRAFT_SLOTS)
    short, long = (Sequence(i, [0] * n, SamplingParams(max_new_tokens=30), i) for i, n in enumerate((1, 40)))
    scheduler.add(short)
    advance(scheduler)
    scheduler.add(long)
    for step in range(1, 20):
        advance(scheduler)
        assert len(short.output_ids) == step + 1
        assert long.num_computed == 2 * step


def test_requests_beyond_the_cache_wait_for_slots_not_for_ever():
    target = tiny_target()
    drafter = tiny_drafter(target)
    config = EngineConfig(max_streams=8, max_model_len=96, kv_gib=memory_for(50, target, drafter))
    engine = Engine(target, drafter, config=config)
    assert engine.cache.num_slots == 50
    sequences = [engine.add([i + 1] * 10, SamplingParams(max_new_tokens=8)) for i in range(6)]
    most = 0
    while engine.has_work:
        engine.step()
        engine.cache.check_integrity()
        most = max(most, len(engine.scheduler.running))
    assert most == 2  # 10 + 8 + a block of 4 each
    assert all(len(s.output_ids) == 8 for s in sequences)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ([], 4, "empty"),
        ([1] * 60, 37, "60 tokens and 37 new ones do not fit the limit of 96"),
        ([1] * 200, 1, "shorten the prompt"),
        ([1, 64], 4, r"outside 0\.\.63"),
        ([-1], 4, r"outside 0\.\.63"),
    ],
)
def test_requests_that_cannot_run_are_refused(prompt: list[int], new_tokens: int, message: str):
    """Refused on arrival with the reason; requests beside them are not disturbed."""
    engine = Engine(tiny_target(), config=EngineConfig(max_streams=2, max_model_len=96))
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, SamplingParams(max_new_tokens=new_tokens))
    assert not engine.has_work
    longest = engine.add([1] * 60, SamplingParams(max_new_tokens=36))
    while engine.has_work:
        engine.step()
    assert len(longest.output_ids) == 36


def test_limits_are_checked_at_the_start():
    with pytest.raises(ValueError, match="max_streams must be above 0"):
        EngineConfig(max_streams=0)
    with pytest.raises(ValueError, match="does not hold a single token"):
        Engine(tiny_target(), config=EngineConfig(kv_gib=1e-7))


def test_a_cancelled_request_gives_back_stream_and_slots():
    """Running or waiting; cancelling twice or after the end does nothing."""
    engine = Engine(tiny_target(), config=EngineConfig(max_streams=1, max_model_len=96))
    running, waiting, last = (engine.add([1, 2, 3], SamplingParams(max_new_tokens=5)) for _ in range(3))
    engine.step()
    for sequence in (running, waiting, running):
        engine.cancel(sequence)
    assert engine.cache.used_slots == 0
    while engine.has_work:
        engine.step()
    engine.cancel(last)
    assert [s.finish_reason for s in (running, waiting, last)] == ["cancelled", "cancelled", "length"]
