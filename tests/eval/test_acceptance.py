"""The command that measures acceptance."""

import json
from pathlib import Path

import pytest

from dspark.cli import main
from dspark.engine.engine import Engine
from dspark.eval import acceptance
from dspark.eval.acceptance import EvalConfig
from dspark.models.loader import Target, load_target
from dspark.sampling import SamplingParams
from tests.tiny import OracleDrafter, tiny_drafter
from tests.tiny_folder import write_tiny_folder


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    return load_target(str(write_tiny_folder(tmp_path_factory.mktemp("model"))), "fp32")


@pytest.fixture
def drafters(target, monkeypatch) -> dict:
    """By the name that the command line gives; the same ones in every run."""
    made = {
        "runs/short": tiny_drafter(target.decoder, block_size=2),
        "runs/oracle": OracleDrafter(target.decoder),
        "none": None,
    }
    monkeypatch.setattr(EvalConfig, "load_target", lambda _: target)
    monkeypatch.setattr(acceptance, "make_drafter", lambda name, *_: made[name])
    return made


OPTIONS = ["--limit", "3", "--max-new-tokens", "8", "--streams", "2"]


def test_drafters_side_by_side_at_top_p(drafters, capsys, tmp_path: Path):
    figure = tmp_path / "new" / "figure.png"
    names = ["--drafter", "runs/short", "--drafter", "runs/oracle"]
    sampling = ["--temperatures", "0.2,1", "--top-p", "0.9"]
    assert main(["eval", *OPTIONS, *names, *sampling, "--plot", str(figure)]) == 0
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "top p" in table and " 0.9 " in table and "oracle" in table and "slot 3" in table
    rows = json.loads(line)["rows"]
    assert [(r["drafter"], r["temperature"], r["domain"]) for r in rows] == [
        (drafter, temperature, domain)
        for drafter in ("runs/short", "runs/oracle")
        for temperature in (0.2, 1.0)
        for domain in ("chat", "code", "math", "macro average")
    ]
    assert all(r["top_p"] == 0.9 and r["rounds"] > 0 for r in rows)
    assert all(len(r["conditional"]) == 2 for r in rows[:8])  # every slot of its block is verified
    assert all(r["conditional"] == [1.0] * 4 and r["accepted_length"] == 5 for r in rows[8:])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_top_p_is_what_the_answers_are_sampled_with(drafters, monkeypatch):
    seen: list[SamplingParams] = []
    original = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, p: seen.append(p) or original(self, ids, p))
    assert main(["eval", *OPTIONS, "--drafter", "runs/short", "--temperatures", "0.2", "--top-p", "0.9"]) == 0
    assert len(seen) == 3 and {(p.temperature, p.top_p) for p in seen} == {(0.2, 0.9)}


def test_a_drafter_that_drafts_nothing_is_refused(drafters, capsys):
    assert main(["eval", *OPTIONS, "--drafter", "runs/short", "--drafter", "none"]) == 2
    assert "drafts nothing" in capsys.readouterr().err


def test_answers_too_short_for_a_block_are_refused(drafters, capsys):
    assert main(["eval", *OPTIONS, "--drafter", "runs/oracle", "--max-new-tokens", "2"]) == 2
    assert "more new tokens" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.parametrize(("drafter", "block_size"), [("dspark", 8), ("mtp", 1)])
def test_command_on_the_shipped_drafters(drafter: str, block_size: int, capsys):
    options = ["--limit", "3", "--temperatures", "0", "--max-new-tokens", "24", "--streams", "3", "--json"]
    assert main(["eval", "--drafter", drafter, *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["domain"] for r in rows] == ["chat", "code", "math", "macro average"]
    assert all(1 <= r["accepted_length"] <= 1 + block_size and len(r["conditional"]) == block_size for r in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperatures", "-1"], "at least 0"),
        (["--limit", "0"], "--limit"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
    ],
)
def test_bad_options_end_in_one_sentence(capsys, options, message):
    assert main(["eval", *options]) == 2
    assert message in capsys.readouterr().err
