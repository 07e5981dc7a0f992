"""A run that is killed, at any moment and however often, ends as if nothing had been."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.tiny_run import run_tiny, state, write_inputs

SETTINGS: dict = {"epochs": 50.0, "save_every_minutes": 1e-9, "sequences_at_once": 4}


def start(folder: Path, **settings) -> subprocess.Popen:
    options = [str(folder), json.dumps({"out": "killed", **SETTINGS, **settings})]
    return subprocess.Popen([sys.executable, "-m", "tests.train.tiny_run", *options], stdout=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, more: int) -> None:
    """Until the run has saved `more` steps further on."""
    record = folder / "killed" / "training.json"

    def step() -> int:
        return json.loads(record.read_text())["progress"]["step"] if record.exists() else 0

    first = step()
    while step() < first + more:
        time.sleep(0.001)


def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path: Path):
    """Every step is saved, so that about every second kill comes in the middle of a write; the last surely does."""
    write_inputs(tmp_path)
    run_tiny(tmp_path, "whole", **SETTINGS)
    moments = random.Random(0)
    for _ in range(2):
        process = start(tmp_path)
        wait_for_step(tmp_path, 1)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done yet
    process = start(tmp_path, die_in_write=3)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run_tiny(tmp_path, "killed", **SETTINGS)["finished"]
    whole, killed = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_stop_signals_leave_a_state_to_resume_from(tmp_path: Path, number: signal.Signals):
    """SIGINT reaches even a background job, which its shell started with SIGINT ignored."""
    write_inputs(tmp_path)
    ignored = signal.signal(number, signal.SIG_IGN)
    try:
        process = start(tmp_path)
    finally:
        signal.signal(number, ignored)
    wait_for_step(tmp_path, 1)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 0
    result = json.loads(out)
    assert not result["finished"]
    record = json.loads((tmp_path / "killed" / "training.json").read_text())
    assert record["progress"]["step"] == len(result["losses"]) < 100
