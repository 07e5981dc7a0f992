"""Rounds collected from live decoding, and the report before and after calibration."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dspark.eval.reliability import Rounds, calibrate, collect_rounds
from dspark.models.loader import Target
from tests.tiny import OracleDrafter, tiny_drafter, tiny_target

TARGET = tiny_target()
MODEL = cast(Target, SimpleNamespace(decoder=TARGET, eos_ids=frozenset()))
PROMPTS = [[3, 4, 5], [9, 8, 7, 6]]


def test_every_whole_round_is_collected():
    finished = []
    rounds = collect_rounds(MODEL, OracleDrafter(TARGET), PROMPTS, (0.0, 1.0), 11, 2, lambda: finished.append(1))
    assert len(finished) == 4
    assert rounds.logits.shape == (len(rounds.accepted), 4)
    assert rounds.accepted.tolist() == [4] * len(rounds.accepted)  # the oracle is always right
    other = collect_rounds(MODEL, tiny_drafter(TARGET), PROMPTS, (1.0,), 11, 2)
    assert other.accepted.max() <= 4 and len(other.accepted) > len(rounds.accepted) / 2


def test_too_short_answers_are_refused():
    with pytest.raises(ValueError, match="more new tokens"):
        collect_rounds(MODEL, tiny_drafter(TARGET), PROMPTS, (0.0,), 2, 2)


def test_calibration_helps_an_overconfident_drafter():
    generator = torch.Generator().manual_seed(0)

    def rounds() -> Rounds:
        truth = torch.randn(6000, 3, generator=generator)
        kept = (torch.rand(6000, 3, generator=generator) < truth.sigmoid()).long().cumprod(1).sum(1)
        return Rounds(truth * 3, kept)

    fitted, before, after = calibrate(rounds(), rounds(), "made up")
    assert all(2 < t < 4.5 for t in fitted.temperatures)
    assert max(after["ece"]) < 0.03 < min(before["ece"])
    assert fitted.ece_after == tuple(after["ece"]) and fitted.num_samples == 6000
