"""TensorBoard scalars, where it is installed, and the sentence where it is not."""

import sys
from pathlib import Path

import pytest

from dspark.train.scalars import Scalars
from dspark.train.trainer import StepResult

ENTRY = {
    "step": 2,
    "heldout_loss": 1.5,
    "heldout_accepted_length": 1.8,
    "heldout_acceptance_by_slot": [0.6, None],
    "domains": {"math": {"heldout_accepted_length": 2.0}},
    "decoded": [{"domain": "math", "temperature": 0.0, "accepted_length": 1.7}],
}


def test_scalars_can_be_read_back(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

    for first in (0, 1):  # a run that was killed after step 2, and its continuation from step 1
        scalars = Scalars(tmp_path, first)
        for step in range(first + 1, 3):
            scalars.step(step, StepResult(10.0 * first + step, 1.2, 7), 1e-3)
        scalars.evaluation(ENTRY)
        scalars.writer.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [e.value for e in read.Scalars("train/loss")] == [1.0, 12.0]
    assert sorted(tag for tag in read.Tags()["scalars"] if tag.startswith("heldout/")) == [
        "heldout/acceptance_by_slot/0",
        "heldout/decoded_accepted_length/math, t=0",
        "heldout/expected_accepted_length",
        "heldout/expected_accepted_length/math",
        "heldout/loss",
    ]


def test_without_tensorboard_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="needs TensorBoard"):
        Scalars(tmp_path, 0)
