"""Where the time of a step goes."""

import time
from dataclasses import dataclass


@dataclass
class StepTimes:
    """Seconds by part of a step, and what was done: of one step, or of all since the start."""

    draft: float = 0.0  # proposing, and taking in committed tokens
    choose: float = 0.0  # whether to draft, and verify lengths
    target: float = 0.0
    sample: float = 0.0  # from the target's logits to verdicts
    other: float = 0.0  # admission and bookkeeping
    rounds: int = 0  # steps in which at least one sequence decoded
    drafted: int = 0  # slots of the drafts made
    verified: int = 0  # draft tokens sent to the target

    @property
    def total(self) -> float:
        return self.draft + self.choose + self.target + self.sample + self.other

    def add(self, more: "StepTimes") -> None:
        for name, value in vars(more).items():
            setattr(self, name, getattr(self, name) + value)


class StepClock:
    """Books each stretch of a step's time to a part of `StepTimes`."""

    def __init__(self):
        self.times = StepTimes()
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What has passed since the last lap is this part's."""
        now = time.perf_counter()
        setattr(self.times, part, getattr(self.times, part) + now - self._last)
        self._last = now
