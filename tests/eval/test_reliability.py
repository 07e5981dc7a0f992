"""The report before and after calibration."""

import torch

from dspark.engine.rounds import Rounds
from dspark.eval.reliability import calibrate


def test_calibration_helps_an_overconfident_drafter():
    generator = torch.Generator().manual_seed(0)

    def rounds() -> Rounds:
        truth = torch.randn(6000, 3, generator=generator)
        kept = (torch.rand(6000, 3, generator=generator) < truth.sigmoid()).long().cumprod(1).sum(1)
        return Rounds(truth[..., None] * 3, kept, kept + 1)

    fitted, before, after = calibrate(rounds(), rounds(), "made up")
    assert all(2 < t < 4.5 for t in fitted.temperatures)
    assert max(after["ece"]) < 0.03 < min(before["ece"])
    assert fitted.ece_after == tuple(after["ece"]) and fitted.num_samples == 6000
