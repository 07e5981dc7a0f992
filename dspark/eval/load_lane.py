"""What the load bench drives: an engine with its requests in flight, and a clock of its own."""

import random
import time
from collections import deque
from dataclasses import dataclass, field, replace

from dspark.engine.engine import Engine
from dspark.engine.sequence import Sequence
from dspark.engine.times import StepTimes
from dspark.eval.load_stats import Tally
from dspark.sampling import SamplingParams


@dataclass
class Lane:
    """An engine, the shuffled prompts it is fed with, and a clock that runs only while it works."""

    engine: Engine
    prompts: list[list[int]]
    params: SamplingParams
    clock: float = 0.0
    finished: int = 0
    tokens: int = 0  # given out since the restart
    live: dict[int, Sequence] = field(default_factory=dict)  # by request id
    waiting: dict[int, float] = field(default_factory=dict)  # those without a first token: when they arrived

    def restart(self, seed: int) -> None:
        """Forget all requests; the same seed brings the same prompts again."""
        for sequence in self.live.values():
            self.engine.cancel(sequence)
        self.live.clear()
        self.waiting.clear()
        self.random, self.deck = random.Random(seed), []
        self.clock, self.finished, self.tokens = 0.0, 0, 0

    def submit(self, arrived: float, max_new_tokens: int | None = None) -> None:
        """Queue the next prompt of the shuffled cycle; None: as many new tokens as all have."""
        if not self.deck:
            self.deck = list(range(len(self.prompts)))
            self.random.shuffle(self.deck)
        params = replace(self.params, max_new_tokens=max_new_tokens or self.params.max_new_tokens)
        sequence = self.engine.add(self.prompts[self.deck.pop()], params)
        self.live[sequence.request_id], self.waiting[sequence.request_id] = sequence, arrived

    def step(self, tally: Tally, streams: int = 0) -> float:
        """One step of the engine, booked to the tally; returns its seconds.

        Then new requests make up for those that ended, so that `streams` are in flight.
        """
        self.engine.times = StepTimes()
        started = time.perf_counter()
        new_tokens = self.engine.step()
        seconds = time.perf_counter() - started
        self.clock += seconds
        counts = {new.sequence.request_id: len(new.token_ids) for new in new_tokens}
        self.tokens += sum(counts.values())
        tally.add_step(sum(counts.values()), seconds, self.engine.times)
        for request_id, sequence in list(self.live.items()):
            if request_id not in self.waiting:
                tally.add_round(request_id, counts.get(request_id, 0), seconds)
            elif request_id in counts:
                tally.first_token_seconds.append(self.clock - self.waiting.pop(request_id))
            if sequence.finish_reason is not None:
                del self.live[request_id]
                self.finished += 1
        while len(self.live) < streams:
            self.submit(self.clock)
        return seconds

    def run_trace(self, tally: Tally, arrivals: list[float]) -> None:
        """Serve all arrivals until the last answer; the clock jumps over idle time."""
        coming = deque(arrivals)
        tally.slices.append([0, 0.0])
        while coming or self.live:
            if not self.live and coming[0] > self.clock:
                tally.slices[-1][1] += coming[0] - self.clock
                self.clock = coming[0]
            while coming and coming[0] <= self.clock:
                self.submit(coming.popleft())
            self.step(tally)


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrival before `seconds`, at least one; the same seed gives the same ones."""
    draws = random.Random(seed)
    times = [draws.expovariate(rate)]
    while (following := times[-1] + draws.expovariate(rate)) < seconds:
        times.append(following)
    return times
