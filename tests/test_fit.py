"""`dspark fit` on a tiny model: the whole way, stopped at every stage and continued, and what it refuses or advises."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dspark import fit
from dspark.cli import main
from dspark.drafters.checkpoint import load_drafter
from dspark.engine.profile import ProfileConfig
from dspark.fit import STAGES, FitConfig
from dspark.train.config import TrainConfig
from dspark.train.data import read_prompts
from dspark.train.output import only_writer
from tests.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 different prompts, one of them twice and one too long."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [f"question {i}" for i in range(24)]
    rows = [{"turns": [text], "domain": "chat"} for text in [*texts, texts[0], "long " * 99]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of tests are kept apart, and small."""
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fit, "ProfileConfig", lambda: ProfileConfig((1, 4, 64), (1, 8), repeats=1, context=8))


def config(out: Path, model: Path, prompts: Path | None, **changes) -> FitConfig:
    """By epochs, so that weights do not depend on the clock; the minutes have time for the fewest answers alone."""
    train = TrainConfig(minutes=1e-4, epochs=1.0, save_every_minutes=1e-9, anchors_per_sequence=8)
    fixed = {"dtype": "fp32", "max_new_tokens": 10, "train": train}
    return FitConfig(str(model), out, prompts, **{**fixed, **changes})


def command(out: Path, model: Path, prompts: Path, *options: str) -> list[str]:
    argv = ["fit", str(model), "--prompts", str(prompts), "--out", str(out), "--dtype", "fp32", "--minutes", "0.02"]
    return [*argv, "--max-new-tokens", "10", *options]


def test_the_whole_way(tmp_path: Path, model: Path, prompts: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    assert main(command(out, model, prompts, "--price-per-hour", "3.6")) == 0
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((out / "report.json").read_text()) and report["verdict"] in output
    assert report["verdict"] in (out / "report.md").read_text() and all((out / name).exists() for name in STAGES)
    assert [(g["streams"], g["temperature"]) for g in report["gains"]] == [(1, 0), (1, 1), (8, 0), (8, 1)]
    for gain in report["gains"]:
        assert gain["cost_per_million_tokens"]["plain"] == pytest.approx(1e3 / gain["tokens_per_s"]["plain"], rel=1e-3)
    assert report["identical_greedy"] == "6/6" and report["prompts"] == 6
    heldout, trained = (read_prompts(out / name) for name in ("heldout-prompts.jsonl", "training-prompts.jsonl"))
    assert (len(heldout), len(trained)) == (6, 18) and len({*heldout, *trained}) == 24
    answered = {json.loads(line)["turns"][0] for line in (out / "answers.jsonl").read_text().splitlines()}
    assert answered == {p.turns[0] for p in trained}
    # Once more: nothing is done again, and the report takes another price.
    times = {name: (out / name).stat().st_mtime_ns for name in STAGES}
    assert main(command(out, model, prompts, "--json", "--price-per-hour", "7.2")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["gains"][0]["tokens_per_s"] == report["gains"][0]["tokens_per_s"]
    assert times == {name: (out / name).stat().st_mtime_ns for name in STAGES}


def results(out: Path) -> dict:
    """What two fits of the same settings have in common: all but figures of time."""
    names = (
        "training-prompts.jsonl",
        "heldout-prompts.jsonl",
        "plan.json",
        "answers.jsonl",
        "drafter/calibration.json",
        "fit.json",
    )
    return {name: (out / name).read_bytes() for name in names}


STOPS = {
    "dspark.fit.write_lines": 1,  # in the prompts, between the files
    "dspark.train.work.write_row": 5,  # in the answers
    "dspark.train.trainer.Trainer.step": 7,
    "dspark.eval.reliability.collect_rounds": 1,
    "dspark.fit.measure_costs": 0,
    "dspark.eval.bench.run_batch": 3,
}


class Stopped(BaseException):
    """As KeyboardInterrupt, from inside."""


def test_stopped_in_every_stage_it_ends_the_same(tmp_path: Path, model: Path, prompts: Path):
    whole, parts = config(tmp_path / "whole", model, prompts), config(tmp_path / "parts", model, prompts)
    fit.fit(whole)
    for number, (name, calls) in enumerate(STOPS.items()):
        with pytest.MonkeyPatch.context() as patch:
            place, _, attribute = name.rpartition(".")
            module, _, owner = place.rpartition(".")
            holder = getattr(sys.modules[module], owner) if owner == "Trainer" else sys.modules[place]
            original, left = getattr(holder, attribute), calls

            def stop(*args, original=original, **named):
                nonlocal left
                if not left:
                    raise Stopped
                left -= 1
                return original(*args, **named)

            patch.setattr(holder, attribute, stop)
            with pytest.raises(Stopped):
                fit.fit(parts)
        assert [(parts.out / stage).exists() for stage in STAGES] == [i < number for i in range(len(STAGES))]
    fit.fit(parts)
    assert results(whole.out) == results(parts.out)
    tensors = (load_drafter(c.drafter).state_dict() for c in (whole, parts))
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in tensors), strict=True))


# The command line in a process that gets a signal in its first training step.
SIGNALLED = """
import os, sys
from dspark.cli import main
from dspark.train.trainer import Trainer
step = Trainer.step
def stop(self, indices):
    os.kill(os.getpid(), int(sys.argv[1]))
    return step(self, indices)
Trainer.step = stop
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_signal_in_training(tmp_path: Path, model: Path, prompts: Path, number: signal.Signals):
    out = tmp_path / "run"
    argv = command(out, model, prompts, "--json")
    python = [sys.executable, "-c", SIGNALLED, str(int(number)), *argv]
    process = subprocess.run(python, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.returncode == (130 if number == signal.SIGTERM else -number) and "Traceback" not in process.stderr
    assert (out / "training").exists() == (number == signal.SIGTERM) and not (out / "drafter").exists()
    answers = (out / "answers.jsonl").stat().st_mtime_ns
    assert main(argv) == 0
    assert (out / "report.json").exists() and (out / "answers.jsonl").stat().st_mtime_ns == answers


def test_prompts_that_the_model_writes(tmp_path: Path, model: Path):
    """The tiny model ends about every other prompt."""
    own = config(tmp_path / "run", model, None)
    (tmp_path / "run").mkdir()
    fit.split_prompts(own)
    heldout, trained = (read_prompts(own.out / name) for name in ("heldout-prompts.jsonl", "training-prompts.jsonl"))
    assert (len(heldout), len(trained)) == (3, 9) and not {*heldout} & {*trained}


def test_what_is_refused(tmp_path: Path, model: Path, prompts: Path, capsys: pytest.CaptureFixture):
    def error_of(*argv: str) -> str:
        assert main(list(argv)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    out = tmp_path / "run"
    few, none = tmp_path / "few.jsonl", tmp_path / "none.jsonl"
    few.write_text('{"prompt": "only one"}\n' * 20)
    none.write_text("")
    assert "12 different prompts of at most 256 tokens are the least" in error_of(*command(out, model, few))
    assert "holds no prompts" in error_of(*command(out, model, none))
    assert "no model" in error_of(*command(out, Path("/nowhere/model.gguf"), prompts))
    assert "minutes" in error_of(*command(out, model, prompts, "--minutes", "0"))
    assert "--price-per-hour must be above 0" in error_of(*command(out, model, prompts, "--price-per-hour", "0"))
    assert "fewer than 2" in error_of(*command(out, model, prompts, "--max-new-tokens", "1"))
    assert not out.exists()
    with only_writer(out / "fit.json"):
        assert "another 'dspark fit' is writing" in error_of(*command(out, model, prompts))
    (out / "fit.json").write_text(json.dumps(config(out, model, few).settings))
    message = error_of(*command(out, model, prompts))
    assert f"fit prompts was {few} and is now {prompts}" in message and "training minutes was 0.0001" in message


def test_prompts_of_the_same_first_turn_stand_on_one_side(tmp_path: Path, model: Path):
    """Measuring decodes first turns: those trained on with a second one were held out without it."""
    path, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    rows = [{"turns": turns} for i in range(16) for turns in ([f"q {i}"], [f"q {i}", "and then?"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.mkdir()
    fit.split_prompts(config(out, model, path))
    texts = [(out / name).read_text().splitlines() for name in ("heldout-prompts.jsonl", "training-prompts.jsonl")]
    heldout, trained = ({json.loads(line)["turns"][0] for line in lines} for lines in texts)
    assert heldout and len(heldout | trained) == 16 and not heldout & trained


def test_answers_that_leave_no_room_for_prompts_are_refused(tmp_path: Path, model: Path, prompts: Path, capsys):
    assert main(command(tmp_path / "run", model, prompts, "--max-new-tokens", "300")) == 2
    assert "give --max-new-tokens of at most 256" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
