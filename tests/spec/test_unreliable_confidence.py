"""A drafter whose confidence is NaN, infinite or constant costs speed at most: outputs stay the target's."""

import math
from collections.abc import Callable

import pytest
import torch

from dspark.drafters.interface import DraftRequest
from dspark.engine.engine import Engine, EngineConfig
from dspark.sampling import SamplingParams
from dspark.spec.calibration import Calibration, OnlineCalibration
from dspark.spec.cost_table import CostTable
from dspark.spec.draft import Draft
from dspark.spec.prefix_scheduler import (
    FixedLength,
    Foresight,
    PrefixScheduler,
    StaleBudget,
    Threshold,
    ThroughputGreedy,
)
from tests.tiny import AdversarialDrafter, plain_greedy, tiny_target

TARGET = tiny_target()
BLOCK, NEW_TOKENS = 4, 20
PROMPTS = [[1 + i, 2, 3, 5, 4][: 3 + i] for i in range(3)]
EXPECTED = [plain_greedy(TARGET, prompt, NEW_TOKENS) for prompt in PROMPTS]
COSTS = CostTable("m", "fp32", "here", (1, 4, 5, 12, 13, 64), (1.0, 1.1, 1.5, 1.5, 2.0, 4.0), (1,), (0.01,), 0.1)

SCHEDULERS: dict[str, Callable[[], PrefixScheduler]] = {
    "fixed": lambda: FixedLength(BLOCK),
    "threshold": lambda: Threshold(0.5),
    "greedy": lambda: ThroughputGreedy(COSTS, warm_up=2, retry_every=3),
    "stale": lambda: StaleBudget(COSTS, warm_up=2, retry_every=3),
    "foresight": lambda: Foresight(COSTS, warm_up=2, retry_every=3),
}
VALUES = {
    "nan": [math.nan],
    "inf": [math.inf],
    "-inf": [-math.inf],
    "zero": [0.0],
    "sure": [30.0],
    "mixed": [math.nan, 2.0, math.inf, -math.inf, -1.0],
}


class Unreliable(AdversarialDrafter):
    """Says about its drafts what it was told to say, one value after the other."""

    def __init__(self, values: list[float]):
        super().__init__(TARGET, BLOCK)
        self.values, self.round = values, 0

    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        draft = super().propose(requests, slots)
        self.round += 1
        index = torch.arange(draft.tokens.numel()).view(draft.tokens.shape) + self.round
        draft.signals = torch.tensor(self.values)[index % len(self.values)][..., None]
        return draft


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_greedy_output_is_unchanged(scheduler: str, values: str, online: bool) -> None:
    engine = Engine(
        TARGET,
        Unreliable(VALUES[values]),
        SCHEDULERS[scheduler](),
        config=EngineConfig(2, 96, prefill_tokens=3),
        calibration=OnlineCalibration(Calibration.identity(BLOCK)) if online else None,
    )
    sequences = [engine.add(prompt, SamplingParams(max_new_tokens=NEW_TOKENS)) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    assert [s.output_ids for s in sequences] == EXPECTED


def test_online_calibration_learns_in_the_engine() -> None:
    """It hears what was accepted: told to be sure, it comes down to how often the adversarial drafter is right."""

    class Counting(OnlineCalibration):
        rounds = accepted = 0

        def observe(self, signals: torch.Tensor, verify_lengths: torch.Tensor, accepted: torch.Tensor) -> None:
            super().observe(signals, verify_lengths, accepted)
            self.rounds += int((verify_lengths > 0).sum())
            self.accepted += int(accepted.sum())

    calibration = Counting(Calibration.identity(BLOCK), prior=1.0)
    engine = Engine(TARGET, Unreliable([3.0]), config=EngineConfig(3, 96), calibration=calibration)
    sequences = [engine.add(prompt, SamplingParams(max_new_tokens=NEW_TOKENS)) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    assert calibration.rounds > 0.9 * sum(s.rounds for s in sequences) - len(sequences)
    assert calibration.accepted >= 0.9 * sum(s.accepted_tokens for s in sequences) > 0
    assert (calibration.shift < 0).all()


def test_no_drafting_at_all() -> None:
    """Where a scheduler does not draft, the drafter is never asked and the output is the target's."""
    drafter = Unreliable([1.0])
    engine = Engine(TARGET, drafter, FixedLength(0), config=EngineConfig(2, 96))
    sequence = engine.add(PROMPTS[0], SamplingParams(max_new_tokens=NEW_TOKENS))
    while engine.has_work:
        engine.step()
    assert drafter.round == 0
    assert sequence.output_ids == EXPECTED[0]
