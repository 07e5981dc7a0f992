"""At temperature 1 the engine's tokens follow the target's exact joint law: sampled through the real batched path.

`tests/spec` proves the algorithm by enumeration; here seeded chi-square tests hold the engine to the same law. Their
power is shown by planting bugs. A right engine gives p > 1e-3, a wrong one p < 1e-6.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import dspark.drafters.bound
import dspark.engine.runner
import dspark.spec.verify
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.interface import Drafter, DraftRequest
from dspark.drafters.load import bind
from dspark.engine.engine import Engine, EngineConfig
from dspark.penalties import Prefix
from dspark.sampling import SamplingParams
from dspark.spec.calibration import Calibration
from dspark.spec.draft import Draft
from dspark.spec.prefix_scheduler import PrefixScheduler, Threshold
from tests.engine.plain import AdjustedTarget
from tests.tiny import AdversarialDrafter, OracleDrafter, tiny_drafter, tiny_target, tiny_variant

VOCAB, OUTPUT = 6, 4  # the prompt gives one token, a round of up to two draft tokens the others
REQUESTS, STREAMS = 2048, 64
PROMPT = (2, 5, 1)
END = frozenset({4})
LARGEST, MATCH_LENGTH = 1, 4  # places in a slot's signals
TARGET = tiny_target(seed=3, vocab_size=VOCAB, num_layers=1)
PLAIN = AdjustedTarget(TARGET, len(PROMPT), END)
ALIVE = {"ignore_eos": True}  # answers of one length make one law
PENALTIES = {"frequency_penalty": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {0: 0.7}}
FILTERS: dict[str, dict[str, Any]] = {
    "everything": ALIVE,
    "top-k": {"top_k": 3, **ALIVE},
    "top-p": {"top_p": 0.8, **ALIVE},
    "min-p": {"min_p": 0.1, **ALIVE},
    "all three": {"top_k": 4, "top_p": 0.9, "min_p": 0.02, **ALIVE},
    "penalties": {**PENALTIES, **ALIVE},
    "penalties and filters": {"top_k": 4, "top_p": 0.95, **PENALTIES, **ALIVE},
    "minimum length": {"min_new_tokens": OUTPUT},  # the end token is impossible throughout
}


@cache
def joint_law(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every output and its probability, from the target's own logits."""
    law: dict[tuple[int, ...], float] = {}
    for output in product(range(VOCAB), repeat=OUTPUT):
        law[output] = 1.0
        for i, token in enumerate(output):
            law[output] *= float(PLAIN.probs(PROMPT + output[:i], params)[token]) if law[output] else 0
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    return law


def p_value(
    drafter: Drafter | None,
    filters: dict[str, Any] = ALIVE,
    scheduler: PrefixScheduler | None = None,
    calibration: Calibration | None = None,
) -> float:
    """Of the outputs of REQUESTS requests against the joint law; rare outputs are counted together."""
    engine = Engine(TARGET, drafter, scheduler, END, EngineConfig(STREAMS, 32, seed=0), calibration)
    sequences = [
        engine.add(list(PROMPT), SamplingParams(1.0, max_new_tokens=OUTPUT, **filters)) for _ in range(REQUESTS)
    ]
    while engine.has_work:
        engine.step()
    counts = Counter(tuple(s.output_ids) for s in sequences)
    law = joint_law(SamplingParams(1.0, max_new_tokens=OUTPUT, **filters))
    if any(law[output] == 0 for output in counts):
        return 0.0  # a token that the target never emits
    common = [output for output in law if law[output] * REQUESTS >= 5]
    observed = [counts[output] for output in common]
    expected = [law[output] * REQUESTS for output in common]
    if REQUESTS - sum(expected) >= 5:
        observed.append(REQUESTS - sum(observed))
        expected.append(REQUESTS - sum(expected))
    scale = sum(observed) / sum(expected)
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET, 1, block_size=2, num_layers=1),
    "pruned": lambda: tiny_drafter(TARGET, 1, block_size=2, draft_vocab_size=4, num_layers=1),
    "copy head": lambda: bind(tiny_variant("copy head", TARGET, block_size=2, seed=1), TARGET),
    "eagle3": lambda: bind(tiny_variant("eagle3", TARGET, block_size=2, seed=1), TARGET),
    "mtp": lambda: bind(tiny_variant("mtp", TARGET, block_size=1, seed=1), TARGET),
    "adversarial": lambda: AdversarialDrafter(TARGET, 2),
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("drafter", ["none", "random", "adversarial"])
def test_output_follows_the_joint_law(drafter: str, filters: str):
    assert p_value(DRAFTERS[drafter](), FILTERS[filters]) > 1e-3


@pytest.mark.parametrize("drafter", ["copy head", "eagle3", "mtp"])
def test_output_follows_the_joint_law_with_other_kinds(drafter: str):
    assert p_value(DRAFTERS[drafter](), FILTERS["everything"]) > 1e-3


def test_output_follows_the_joint_law_with_few_candidates(monkeypatch: pytest.MonkeyPatch):
    """Drafts over a pruned vocabulary, and there from the best candidates only."""
    monkeypatch.setattr(dspark.drafters.bound, "NUM_CANDIDATES", 3)
    assert p_value(DRAFTERS["pruned"]()) > 1e-3


class Revealing(OracleDrafter):
    """Identical to the target; confidence is high where a token is even, so who obeys it verifies by value.

    That token is the slot's own with `shift` 0, the one before it with 1.
    """

    def __init__(self, shift: int):
        super().__init__(TARGET, block_size=2)
        self.plain, self.shift = PLAIN, shift  # PLAIN knows the penalties

    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        draft = super().propose(requests, slots)
        anchors = torch.tensor([[r.token_ids[-1]] for r in requests])
        block = torch.cat([anchors, draft.tokens], 1)  # [R, G + 1]
        seen = block[:, 1:] if self.shift == 0 else block[:, :-1]
        draft.signals = torch.where(seen % 2 == 0, 5.0, -5.0)[..., None]
        return draft


@pytest.mark.parametrize("filters", ["everything", "all three", "penalties"])
def test_a_scheduler_may_use_the_tokens_before_a_slot(filters: str):
    assert p_value(Revealing(shift=1), FILTERS[filters], Threshold(0.5)) > 1e-3


# ---- the power of the tests: planted bugs


@pytest.mark.parametrize("filters", ["everything", "all three", "penalties"])
def test_a_scheduler_that_sees_the_token_it_decides_on_is_caught(filters: str):
    assert p_value(Revealing(shift=0), FILTERS[filters], Threshold(0.5)) < 1e-6


@pytest.mark.parametrize("filters", ["everything", "all three", "penalties"])
@pytest.mark.parametrize("drafter", ["random", "adversarial"])
def test_a_forgotten_residual_is_caught(drafter: str, filters: str, monkeypatch: pytest.MonkeyPatch):
    """A rejected token replaced by a sample of the target's own distribution."""

    def wrong(target_probs: Tensor, support: Tensor, draft_probs: Tensor, prefix_probs: Tensor) -> Tensor:
        return target_probs

    monkeypatch.setattr(dspark.spec.verify, "residual_weights", wrong)
    monkeypatch.setattr(dspark.engine.runner, "compiled", lambda x: False)  # which has a residual of its own
    assert p_value(DRAFTERS[drafter](), FILTERS[filters]) < 1e-6


class Untruncated(DSparkDrafter):
    """Samples as it should but reports the distribution before the request's filters and before NUM_CANDIDATES."""

    def decode_block(self, requests: list[DraftRequest], hidden: Tensor) -> Draft:
        draft = super().decode_block(requests, hidden)
        anchors = torch.tensor([[r.token_ids[-1]] for r in requests])
        previous = torch.cat([anchors, draft.tokens[:, :-1]], 1)  # [R, G]
        assert self.model.markov_head is not None
        logits = self.head(hidden.flatten(0, 1)) + self.w2(self.model.markov_head.markov_w1(previous.flatten()))
        draft.draft_probs = logits.float().softmax(-1).view(*previous.shape, -1)
        draft.support = self.d2t.expand(draft.draft_probs.shape)
        return draft


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_draft_probs_from_before_the_filters_are_caught(filters: dict[str, Any]):
    drafter = tiny_drafter(TARGET, 1, block_size=2, num_layers=1)
    assert p_value(drafter, {**filters, **ALIVE}) > 1e-3
    drafter.__class__ = Untruncated
    assert p_value(drafter, {**filters, **ALIVE}) < 1e-6


class Telling(DSparkDrafter):
    """Its evidence is the drawn token's own probability, not the largest one."""

    def decode_block(self, requests: list[DraftRequest], hidden: Tensor) -> Draft:
        draft = super().decode_block(requests, hidden)
        own = draft.draft_probs * (draft.support == draft.tokens[..., None])
        draft.signals[..., 1] = own.sum(-1)
        return draft


def above(signal: int, least: float) -> Calibration:
    """Confidence is near 1 where that signal is above `least`, near 0 elsewhere."""
    weights = tuple(float(i == signal) for i in range(6 + 21))  # no products
    return Calibration((0.01, 0.01), shifts=(-100 * least,) * 2, weights=(weights,) * 2)


def test_evidence_may_tell_whether_there_is_something_to_copy():
    """Verified is what would follow a token that stood in the context before."""
    drafter = DRAFTERS["copy head"]()
    assert p_value(drafter, scheduler=Threshold(0.5), calibration=above(MATCH_LENGTH, 0.5)) > 1e-3


@pytest.mark.parametrize("filters", ["everything", "all three", "penalties"])
def test_evidence_may_tell_of_the_distribution_and_not_of_the_token(filters: str):
    """Verified is what the evidence says is likelier than some value, about the median for the right drafter."""
    drafter = tiny_drafter(TARGET, 1, block_size=2, num_layers=1)

    def p_above(least: float) -> float:
        return p_value(drafter, FILTERS[filters], Threshold(0.5), above(LARGEST, least))

    assert p_above(0.85) > 1e-3
    drafter.__class__ = Telling
    assert p_above(0.5) < 1e-6


@pytest.mark.parametrize("filters", ["everything", "penalties"])
def test_draft_probs_of_tokens_that_were_no_candidates_are_caught(filters: str, monkeypatch: pytest.MonkeyPatch):
    """The same drafter is right where it may sample from all that it reports."""
    drafter = tiny_drafter(TARGET, 1, block_size=2, num_layers=1)
    drafter.__class__ = Untruncated
    assert p_value(drafter, FILTERS[filters]) > 1e-3
    monkeypatch.setattr(dspark.drafters.bound, "NUM_CANDIDATES", 1)
    assert p_value(drafter, FILTERS[filters]) < 1e-6


def test_penalties_that_forget_the_drafted_part_are_caught(monkeypatch: pytest.MonkeyPatch):
    """Each row must count the draft tokens before it; here all rows of a round count the committed ones alone."""
    right = dspark.engine.runner.row_prefixes

    def wrong(batch: Any) -> list[Prefix]:
        return [prefix._replace(drafted=()) for prefix in right(batch)]

    monkeypatch.setattr(dspark.engine.runner, "row_prefixes", wrong)
    assert p_value(DRAFTERS["random"](), FILTERS["penalties"]) < 1e-6
