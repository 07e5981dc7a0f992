"""Prompt sets: balanced over domains for every limit."""

import json
from collections import Counter

import pytest

from dspark.eval.report import make_table, print_report
from dspark.eval.setting import Setting


def test_the_own_set_is_thirty_prompts_of_three_domains():
    assert Counter(p.domain for p in Setting().load_prompts()) == {"math": 10, "code": 10, "chat": 10}


@pytest.mark.parametrize("limit", [3, 4, 12])
def test_any_limit_is_spread_over_the_domains(limit):
    counts = Counter(p.domain for p in Setting(limit=limit).load_prompts())
    assert sum(counts.values()) == limit and max(counts.values()) - min(counts.values()) <= 1


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="--limit"):
        Setting(limit=0)


def test_a_report_is_json_whatever_was_measured(capsys):
    """NaN is a score of outcomes that are all alike; brackets of a path are no markup."""
    table = make_table("", ["drafter:<"], [{"drafter": "runs/new[v2]"}])
    print_report({"auc": [0.5, float("nan")], "nested": {"ece": (float("nan"),)}}, True, table)
    out, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "runs/new[v2]" in out
    report = json.loads(line, parse_constant=pytest.fail)
    assert report["auc"] == [0.5, None] and report["nested"] == {"ece": [None]}
