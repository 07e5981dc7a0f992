"""Rounds collected from live decoding: accepted lengths and conditional acceptance, by domain."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dspark.engine.rounds import Rounds, acceptance, acceptance_by_domain, collect_rounds, macro_average
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from tests.tiny import OracleDrafter, tiny_drafter, tiny_target

TARGET = tiny_target()
MODEL = cast(Target, SimpleNamespace(decoder=TARGET, eos_ids=frozenset()))
PROMPTS = [[3, 4, 5], [9, 8, 7, 6]]


def params(temperature: float, max_new_tokens: int = 11) -> SamplingParams:
    return SamplingParams(temperature, max_new_tokens=max_new_tokens)


def test_every_whole_round_is_collected():
    finished = []
    oracle = OracleDrafter(TARGET)
    rounds = Rounds.together(
        collect_rounds(MODEL, oracle, PROMPTS, params(t), 2, lambda: finished.append(1)) for t in (0.0, 1.0)
    )
    assert len(finished) == 4
    assert rounds.signals.shape == (len(rounds.accepted), 4, 1)
    assert rounds.accepted.tolist() == [4] * len(rounds.accepted)  # the oracle is always right
    other = collect_rounds(MODEL, tiny_drafter(TARGET), PROMPTS, params(1.0), 2)
    assert other.accepted.max() <= 4 and len(other.accepted) > len(rounds.accepted) / 2


def test_too_short_answers_are_refused():
    with pytest.raises(ValueError, match="more new tokens"):
        collect_rounds(MODEL, tiny_drafter(TARGET), PROMPTS, params(0.0, 2), 2)


def test_figures_of_known_rounds():
    figures = acceptance(torch.tensor([0, 0, 1, 2, 3]), 3)
    assert figures == {"rounds": 5, "accepted_length": 2.2, "conditional": [0.6, 0.6667, 0.5]}


def test_slots_that_no_round_reached_have_no_figure():
    assert acceptance(torch.tensor([0, 0]), 2)["conditional"] == [0.0, None]


def test_every_domain_weighs_the_same():
    rows = [
        {"temperature": 0.0, "top_p": 1.0, "domain": d, "prompts": 1, **acceptance(torch.tensor(accepted), 2)}
        for d, accepted in (("chat", [0] * 9), ("math", [2]))
    ]
    average = macro_average(rows)
    assert average["accepted_length"] == 2.0 and average["rounds"] == 10
    assert average["conditional"] == [0.5, 1.0]


def test_every_domain_is_decoded():
    prompts = {"math": PROMPTS, "chat": [[5, 6]]}
    rows = acceptance_by_domain(MODEL, OracleDrafter(TARGET), prompts, params(1.0), 2)
    assert [(r["domain"], r["prompts"]) for r in rows] == [("chat", 1), ("math", 2), ("macro average", 3)]
    assert all(r["accepted_length"] == 5 and r["temperature"] == 1.0 for r in rows)
