"""Several processes: the same losses and weights as one, whatever shares the work and whoever saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dspark.drafters.checkpoint import load_drafter
from dspark.train.checkpoint import last_state
from tests.train.tiny_run import run_tiny, state, write_inputs

SETTINGS: dict = {"sequences_at_once": 1, "evaluations": 2}
KINDS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A folder of runs, `one` by this process, and the losses of what two processes did in one start of torchrun:
    whole runs, the second half of runs that this process began, and the first half of others.
    """
    folder = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    for kind in KINDS:
        run_tiny(folder, f"one-{kind}", stop_after=3, **SETTINGS)
    jobs = [
        {"out": out.format(kind), "stop_after": stop_after, "parallel": kind, **SETTINGS}
        for kind in KINDS
        for out, stop_after in (("{}", None), ("one-{}", None), ("{}-one", 3))
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.train.tiny_run"]
    options = [str(folder), *map(json.dumps, jobs)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_losses_and_weights_are_those_of_one_process(runs):
    folder, results = runs
    whole = run_tiny(folder, "one", **SETTINGS)
    expected = state(folder / "one")
    for kind, (of_whole, second_half, first_half) in zip(KINDS, (results[:3], results[3:]), strict=True):
        assert not first_half["finished"] and len(first_half["losses"]) == 3
        written = last_state(folder / f"{kind}-one")
        assert written is not None and len(list(written.glob("*.safetensors"))) == 2  # each process its own
        assert run_tiny(folder, f"{kind}-one", **SETTINGS)["finished"]
        torch.testing.assert_close(of_whole["losses"], whole["losses"], atol=1e-5, rtol=0)
        torch.testing.assert_close(second_half["losses"], whole["losses"][3:], atol=1e-5, rtol=0)
        for out in (kind, f"one-{kind}", f"{kind}-one"):
            found = state(folder / out)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                tolerance = 1e-2 if name.startswith("exported.") else 2e-6  # the export is in bf16
                torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=f"{out}: {name}")
            assert load_drafter(folder / out).config == load_drafter(folder / "initial").config
