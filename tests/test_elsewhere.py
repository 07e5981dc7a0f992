"""The commands on a device that is not the CPU: from prompts to answers of a trained drafter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

from dspark.cli import main
from tests.tiny_folder import write_tiny_folder

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
MODEL = ["--model", "model", "--dtype"]
ASKED = ["hello hello what", "--json", "--n", "2", "--max-new-tokens", "8", "--seed", "3"]
SAMPLINGS = (
    [],
    ["--temperature", "1", "--top-k", "9"],
    ["--temperature", "0.7", "--min-p", "0.01", "--presence-penalty", "1", "--logprobs", "2"],
)
TRAINING = "--data a.jsonl --epochs 1 --sequences-per-step 4 --heldout 2 --evaluations 1 --max-length 64 --anchors 8"
KINDS = {
    "rnn": ["--markov-head", "rnn", "--window", "8", "--draft-layers", "1", "--feature-cache", "features"],
    "gated": ["--markov-head", "gated", "--optimizer", "muon", "--draft-layers", "1"],
    "longer": ["--initial", "vanilla", "--block-size", "8"],
    "zlab": ["--drafter", "dflash-zlab", "--draft-layers", "1"],
    "eagle3": ["--drafter", "eagle3", "--draft-vocab-size", "200"],
    "mtp": ["--drafter", "mtp"],
}


def elsewhere(folder: Path, *commands: list[str]) -> str:
    """What these commands print, one after the other, on the other device."""
    argv = [sys.executable, "-m", "tests.elsewhere", str(folder), *map(json.dumps, commands)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(name: str, *options: str) -> list[str]:
    return ["train", *MODEL, "bf16", *TRAINING.split(), "--out", name, *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, answers that it gave, and a DSpark drafter trained on them, all on the other device."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_tiny_folder(folder / "model")
    rows = [{"turns": [f"hello {i} what is the the"], "domain": "ab"[i % 2]} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data", *MODEL, "bf16", "--prompts", "prompts.jsonl", "--out", "a.jsonl", "--max-new-tokens", "12"]
    measured = ["--drafter", "./vanilla", "--prompts", "prompts.jsonl", "--max-new-tokens", "8"]
    elsewhere(
        folder,
        data,
        trained("vanilla", "--draft-layers", "1", "--draft-vocab-size", "200"),
        ["calibrate", *MODEL, "bf16", *measured, "--samplings", "0,1"],
        ["eval", *MODEL, "bf16", *measured, "--limit", "4"],
    )
    return folder


def test_tensors_of_two_devices_do_not_mix():
    """Otherwise the tests below would prove nothing."""
    mixed = "with register(): torch.zeros(2, device='elsewhere') + torch.zeros(2)"
    command = [sys.executable, "-c", f"import torch\nfrom tests.elsewhere import register\n{mixed}"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert "expected all tensors to be on the same device" in done.stderr


def test_the_answers_of_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(folder)
    drafter = ["--drafter", "./vanilla", "--policy", "fixed-4"]
    commands = [["generate", *MODEL, "fp32", *ASKED, *drafter, *sampling] for sampling in SAMPLINGS]
    assert [main(command) for command in commands] == [0, 0, 0]
    expected = [json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line)["token_ids"] for line in elsewhere(folder, *commands).splitlines()] == expected


def test_every_kind_is_trained_and_serves(folder: Path):
    """In one process, as it starts slowly."""
    commands = []
    for kind, options in KINDS.items():
        drafter = ["--drafter", f"./{kind}", "--policy", "fixed-1", "--temperature", "1"]
        commands += [trained(kind, *options), ["generate", *MODEL, "bf16", *ASKED, *drafter]]
    assert len(elsewhere(folder, *commands).splitlines()) == 2 * len(KINDS)
