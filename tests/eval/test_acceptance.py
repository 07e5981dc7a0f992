"""Accepted lengths and conditional acceptance of real rounds."""

import json

import pytest
import torch

from dspark.cli import main
from dspark.eval.acceptance import acceptance, macro_average


def test_figures_of_known_rounds():
    figures = acceptance(torch.tensor([0, 0, 1, 2, 3]), 3)
    assert figures == {"rounds": 5, "accepted_length": 2.2, "conditional": [0.6, 0.6667, 0.5]}


def test_slots_that_no_round_reached_have_no_figure():
    assert acceptance(torch.tensor([0, 0]), 2)["conditional"] == [0.0, None]


def test_every_domain_weighs_the_same():
    rows = [
        {"temperature": 0.0, "domain": d, "prompts": 1, **acceptance(torch.tensor(accepted), 2)}
        for d, accepted in (("chat", [0] * 9), ("math", [2]))
    ]
    average = macro_average(rows)
    assert average["accepted_length"] == 2.0 and average["rounds"] == 10
    assert average["conditional"] == [0.5, 1.0]


@pytest.mark.model
def test_command_on_the_shipped_drafter(capsys):
    options = ["--limit", "3", "--temperatures", "0", "--max-new-tokens", "24", "--streams", "3", "--json"]
    assert main(["eval", *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["domain"] for r in rows] == ["chat", "code", "math", "macro average"]
    assert all(1 <= r["accepted_length"] <= 5 and len(r["conditional"]) == 4 for r in rows)


@pytest.mark.parametrize("options, message", [(["--temperatures", "-1"], "at least 0"), (["--limit", "0"], "--limit")])
def test_bad_options_end_in_one_sentence(capsys, options, message):
    assert main(["eval", *options]) == 2
    assert message in capsys.readouterr().err
