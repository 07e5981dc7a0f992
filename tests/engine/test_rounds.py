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


def known(accepted: list[int], block_size: int, committed: list[int] | None = None) -> Rounds:
    """Rounds of which none ends its answer, unless `committed` says so."""
    counts = torch.tensor(accepted)
    return Rounds(torch.zeros(len(counts), block_size, 1), counts, torch.tensor(committed or (counts + 1).tolist()))


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
    figures = acceptance(known([0, 0, 1, 2, 3], 3))
    assert figures == {"rounds": 5, "accepted_length": 2.2, "conditional": [0.6, 0.6667, 0.5]}


def test_what_is_accepted_behind_the_end_of_an_answer_does_not_count():
    """The second round ends with its first draft token, the third with the target's own."""
    figures = acceptance(known([1, 3, 0], 3, committed=[2, 1, 1]))
    assert figures == {"rounds": 3, "accepted_length": round(4 / 3, 4), "conditional": [0.6667, 0.0, None]}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_counted_as_the_request_got_them(temperature: float):
    ends = cast(Target, SimpleNamespace(decoder=TARGET, eos_ids=frozenset(range(0, 64, 5))))
    oracle, asked = OracleDrafter(TARGET), params(temperature, 40)
    rounds = collect_rounds(ends, oracle, [[i, i + 1] for i in range(2, 30)], asked, 3)
    assert (rounds.committed < rounds.accepted).any() and rounds.committed.min() >= 1
    assert acceptance(rounds)["conditional"] == [1.0] * 4


def test_slots_that_no_round_reached_have_no_figure():
    assert acceptance(known([0, 0], 2))["conditional"] == [0.0, None]


def test_every_domain_weighs_the_same():
    rows = [
        {"temperature": 0.0, "top_p": 1.0, "domain": d, "prompts": 1, **acceptance(known(accepted, 2))}
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
