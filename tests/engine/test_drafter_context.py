"""Whenever the drafter is asked, it knows all committed tokens, however long they waited and wherever they moved."""

from itertools import chain

import pytest
import torch

from dspark.drafters.bound import BoundDrafter
from dspark.drafters.interface import DraftRequest
from dspark.drafters.load import bind
from dspark.engine import drafter_context
from dspark.engine.engine import Engine, EngineConfig
from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft
from dspark.spec.prefix_scheduler import FixedLength
from dspark.spec.walk import Load
from tests.tiny import PlainAttention, memory_for, plain_greedy, tiny_target, tiny_variant

TARGET = tiny_target()
SHARED = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [SHARED[: 16 + i % 5] + [i, 2 * i + 1] for i in range(7)]


class Sometimes(FixedLength):
    """Drafts every 7th round, for every other request."""

    rounds = 0

    def to_draft(self, load: Load) -> list[int]:
        object.__setattr__(self, "rounds", self.rounds + 1)
        return [] if self.rounds % 7 else list(range(0, load.requests, 2))


@pytest.mark.parametrize("most_bytes", [1, 15_000, 1 << 20])
@pytest.mark.parametrize("slots", [200, 900], ids=["preempting", "roomy"])
@pytest.mark.parametrize("variant", ["feature input", "eagle3"])
def test_it_knows_all_committed_tokens(variant: str, slots: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny_variant(variant, TARGET)
    drafter = bind(model, TARGET)
    config = EngineConfig(4, 180, kv_gib=memory_for(slots, TARGET, drafter), prefill_tokens=9)
    engine = Engine(TARGET, drafter, Sometimes(2), config=config)
    assert engine.context is not None
    assert engine.kv_bytes + engine.context.most_bytes <= config.kv_gib * 2**30
    engine.context.most_bytes = most_bytes
    asked = 0

    def propose(requests: list[DraftRequest], slots: int, propose=drafter.propose) -> Draft:
        nonlocal asked
        for request in requests:
            tokens = torch.tensor(request.token_ids[:-1])
            positions = torch.arange(len(tokens))
            output = TARGET.forward(tokens, positions, PlainAttention(TARGET.config.group_size), drafter.tap_layers)
            fresh = bind(model, TARGET)
            fresh.allocate(len(tokens))
            fresh.extend(output.taps, tokens, positions, positions)
            for ours, theirs in zip(drafter._storage, fresh._storage, strict=True):
                known = ours[request.first_slot : request.first_slot + len(tokens)]
                torch.testing.assert_close(known, theirs, atol=1e-4, rtol=1e-4)
            asked += 1
        return propose(requests, slots)

    monkeypatch.setattr(drafter, "propose", propose)
    sequences = [engine.add(prompt, SamplingParams(max_new_tokens=90)) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    assert [s.output_ids for s in sequences] == [plain_greedy(TARGET, prompt, 90) for prompt in PROMPTS]
    assert asked > 10 and engine.counters.reused_tokens > 0
    assert (engine.counters.preemptions > 0) == (slots == 200)


def taken_in_by(drafter: BoundDrafter, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The slots of each call of its `extend` from now on."""
    calls: list[list[int]] = []

    def extend(taps: list[torch.Tensor], *rows: torch.Tensor, extend=drafter.extend) -> None:
        calls.append(rows[2].tolist())
        extend(taps, *rows)

    monkeypatch.setattr(drafter, "extend", extend)
    return calls


class FirstOnly(FixedLength):
    """Drafts for the oldest request alone."""

    def to_draft(self, load: Load) -> list[int]:
        return [0]


def test_others_wait_and_are_forgotten_when_they_end(monkeypatch: pytest.MonkeyPatch):
    drafter = bind(tiny_variant("feature input", TARGET), TARGET)
    engine = Engine(TARGET, drafter, FirstOnly(2), config=EngineConfig(3, 180, reuse_prefixes=False))
    context = engine.context
    assert context is not None
    calls = taken_in_by(drafter, monkeypatch)
    first, *others = [engine.add(PROMPTS[i], SamplingParams(max_new_tokens=n)) for i, n in enumerate((60, 5, 9))]
    engine.step()
    own = range(first.first_slot, first.first_slot + first.kv.capacity)
    while any(s.finish_reason is None for s in others):
        engine.step()
    assert set(context.waiting) > {first.kv} and context.waiting_bytes > 0
    assert calls and set(chain(*calls)) < set(own)
    context.take_in(list(context.waiting))
    assert set(chain(*calls)) < set(own) and not context.waiting and not context.waiting_bytes


def test_of_too_much_that_waits_the_oldest_is_taken_in(monkeypatch: pytest.MonkeyPatch):
    """A little at a time: all at once would make one step last as long as dozens of others."""
    monkeypatch.setattr(drafter_context, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(drafter_context, "MOST_ROWS", 8)
    drafter = bind(tiny_variant("feature input", TARGET), TARGET)
    engine = Engine(TARGET, drafter, FixedLength(0), config=EngineConfig(4, 180, reuse_prefixes=False))
    context = engine.context
    assert context is not None
    context.most_bytes = 60_000
    calls = taken_in_by(drafter, monkeypatch)
    sequences = [engine.add(PROMPTS[i], SamplingParams(max_new_tokens=90)) for i in range(4)]
    most_a_step = 0
    while engine.has_work:
        before = len(calls)
        engine.step()
        most_a_step = max(most_a_step, sum(map(len, calls[before:])))
        assert context.waiting_bytes <= 60_000
    assert max(map(len, calls)) <= 8 < most_a_step < sum(map(len, calls)) / 3
    assert [s.output_ids for s in sequences] == [plain_greedy(TARGET, prompt, 90) for prompt in PROMPTS[:4]]
