"""Any order of submitting, stepping, cancelling and preempting in an arena that is far too small: accounts agree after
each, and every request gets the tokens that it gets alone in an empty engine."""

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dspark.drafters.load import bind
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.sequence import Sequence
from dspark.sampling import SamplingParams
from tests.tiny import AdversarialDrafter, memory_for, tiny_drafter, tiny_target, tiny_variant

TARGET = tiny_target(vocab_size=24, num_layers=2)
ADVERSARIAL = AdversarialDrafter(TARGET, 3)  # accepts and rejects; remembers what it computed
DRAFTERS = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET, block_size=3),
    "copy head": lambda: bind(tiny_variant("copy head", TARGET, block_size=3), TARGET),
    "eagle3": lambda: bind(tiny_variant("eagle3", TARGET, window=6, block_size=3), TARGET),
    "adversarial": lambda: ADVERSARIAL,
}
SHARED = (5, 1, 7, 7, 2, 9, 4, 4, 1, 0, 3, 3, 8, 2, 6, 1, 9, 0, 5, 2)
# Few different ones, so that the reference is computed once and prefixes repeat.
PROMPTS = (SHARED[:1], SHARED[:7], SHARED, (*SHARED[:17], 11, 12), (*SHARED, 13, 14, 15))
PARAMS = (
    SamplingParams(max_new_tokens=18),
    SamplingParams(max_new_tokens=1),
    SamplingParams(0.9, seed=3, max_new_tokens=18),
    SamplingParams(0.7, top_k=6, seed=4, max_new_tokens=11),
)
LONGEST = len(PROMPTS[-1]) + 18


@cache
def alone(drafter: str, prompt: tuple[int, ...], params: SamplingParams) -> tuple[list[int], int, int]:
    engine = Engine(TARGET, DRAFTERS[drafter](), config=EngineConfig(1, 128, reuse_prefixes=False))
    sequence = engine.add(list(prompt), params)
    while engine.has_work:
        engine.step()
    assert engine.counters.preemptions == engine.counters.moves == 0
    return course(sequence)


def course(sequence: Sequence) -> tuple[list[int], int, int]:
    return sequence.output_ids, sequence.rounds, sequence.accepted_tokens


class Load(RuleBasedStateMachine):
    """`emitted` is what a client has seen of each request: it must only ever grow into the reference."""

    @initialize(
        drafter=st.sampled_from(list(DRAFTERS)),
        spare=st.integers(0, 25),
        streams=st.integers(1, 4),
        prefill=st.integers(3, 20),
        growth=st.integers(0, 6),
        reuse=st.booleans(),
    )
    def start(self, drafter: str, spare: int, streams: int, prefill: int, growth: int, reuse: bool) -> None:
        self.drafter, made = drafter, DRAFTERS[drafter]()
        num_slots = LONGEST + 3 + spare
        config = EngineConfig(streams, 128, memory_for(num_slots, TARGET, made), prefill, reuse)
        self.engine = Engine(TARGET, made, config=config)
        self.engine.scheduler.growth = growth
        assert self.engine.cache.num_slots == num_slots
        self.requests: list[tuple[Sequence, tuple[int, ...]]] = []
        self.emitted: dict[int, list[int]] = {}

    @rule(prompt=st.sampled_from(PROMPTS), params=st.sampled_from(PARAMS))
    def submit(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        sequence = self.engine.add(list(prompt), params)
        self.requests.append((sequence, prompt))
        self.emitted[sequence.request_id] = []

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work:
                for new in self.engine.step():
                    assert new.token_ids
                    self.emitted[new.sequence.request_id] += new.token_ids
                self.accounts_agree()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), twice=st.booleans())
    def cancel(self, data: st.DataObject, twice: bool) -> None:
        sequence = data.draw(st.sampled_from([s for s, _ in self.requests]))
        reason = sequence.finish_reason or "cancelled"
        for _ in range(1 + twice):
            self.engine.cancel(sequence)
        assert sequence.finish_reason == reason and sequence.region is None

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.engine.scheduler.preempt()

    @invariant()
    def accounts_agree(self) -> None:
        self.engine.scheduler.check_integrity()
        assert self.engine.has_work == any(s.finish_reason is None for s, _ in self.requests)

    @invariant()
    def outputs_are_those_of_the_request_alone(self) -> None:
        for sequence, prompt in self.requests:
            output, rounds, accepted = alone(self.drafter, prompt, sequence.params)
            assert self.emitted[sequence.request_id] == sequence.output_ids == output[: len(sequence.output_ids)]
            if sequence.finish_reason not in (None, "cancelled"):
                assert course(sequence) == (output, rounds, accepted)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_work:
            self.step(1)
            steps += 1
            assert steps < 100 * (1 + len(self.requests)), "no request is kept from its end"
        self.outputs_are_those_of_the_request_alone()
        assert self.engine.cache.used_slots == 0


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
