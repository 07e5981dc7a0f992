"""The command that measures acceptance."""

import json

import pytest

from dspark.cli import main


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
