"""Sampling parameters, truncated distributions, tokens drawn from them.

Shapes: N = rows, V = vocabulary size.
"""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark.sampling import SamplingParams, categorical, first_maximum, token_logprobs, truncated_probs

# ---- SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("top_k", 2**63),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("seed", 2**63),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e-38),
        ("n", 0),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_bad_parameter_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .* got {re.escape(str(value))}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: math.nan}),
        ("stop_token_ids", (-1,)),
        ("stop", ("x", "")),
    ],
)
def test_bad_entry_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        SamplingParams(**{name: value})


def test_parameters_are_hashable_whatever_they_are_given_as() -> None:
    given: Any = {"stop": "x", "stop_token_ids": [3, 4], "logit_bias": {7: 1.0, 2: -1.0}}
    params = SamplingParams(**given)
    same = SamplingParams(stop=("x",), stop_token_ids=(3, 4), logit_bias=((2, -1.0), (7, 1.0)))
    assert params == same and hash(params) == hash(same)
    assert (params.stop, params.logit_bias) == (("x",), ((2, -1.0), (7, 1.0)))


def test_defaults_are_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.5, top_p=1.0, min_p=0.99).greedy


# ---- truncated_probs


def truncate(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """All rows with the same parameters."""
    columns = [torch.full(logits.shape[:1], x, dtype=torch.float64) for x in (temperature, top_k, top_p, min_p)]
    return truncated_probs(logits, *columns)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"top_p": 1e-3},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.7, "min_p": 0.15},
    {"temperature": 2.5, "top_k": 300, "top_p": 0.95},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocab", "spread"), [(600, 2.0), (6000, 0.1)], ids=["peaked", "flat"])
def test_equals_transformers(vocab: int, spread: float, setting: dict[str, Any]) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, vocab, generator=generator, dtype=torch.float64) * spread
    warpers = {
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    scores = logits
    for name, warper in warpers.items():
        if name in setting:
            scores = warper(setting[name])(None, scores)
    torch.testing.assert_close(truncate(logits, **setting), scores.softmax(-1), rtol=1e-12, atol=0)


def test_rows_have_their_own_parameters() -> None:
    """A mixed batch, greedy rows included, gives each row what it gets alone."""
    logits = torch.randn(len(SETTINGS) + 1, 5000, generator=torch.Generator().manual_seed(1))
    settings = [*SETTINGS, {"temperature": 0.0, "top_p": 0.5}]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = [
        torch.tensor([setting.get(name, default) for setting in settings], dtype=torch.float64)
        for name, default in defaults.items()
    ]
    together = truncated_probs(logits, *columns)
    for row, setting in enumerate(settings):
        assert together[row : row + 1].equal(truncate(logits[row : row + 1], **setting))


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_the_nucleus_of_a_large_vocabulary(spread: float) -> None:
    """Narrow and wide ones, all in one place and everywhere, as a sort of the whole vocabulary finds them."""
    vocab, top_p = 20_001, torch.tensor([0.1, 0.5, 0.9, 0.95, 0.99, 0.999])
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1)) * spread
    logits[1, 300:500] += 20.0  # a block and a half
    logits[2, ::500] += 20.0  # many blocks
    logits[3, 7] += 60.0
    logits[4, -3:] = logits[4].amax() + 1.0  # ties in a block that is not whole
    ones, zeros = torch.ones(6), torch.zeros(6)
    probs = truncated_probs(logits, ones, zeros.long(), top_p, zeros)
    ranked, order = logits.softmax(-1).sort(-1, descending=True)
    kept = (ranked.double().cumsum(-1) - ranked < top_p[:, None]).sum(-1, keepdim=True)
    floor = logits.gather(-1, order).gather(-1, kept - 1)
    edge = 2 if spread else vocab  # rounding of the sums may move the end by a token or two, where all are equal by all
    assert ((probs > 0).sum(-1) - (logits >= floor).sum(-1)).abs().max() <= edge
    assert bool((probs.amax(-1) > 0).all())
    torch.testing.assert_close(probs.sum(-1), ones)


def test_input_is_left_alone() -> None:
    logits = torch.randn(2, 50)
    before = logits.clone()
    truncate(logits, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)
    assert logits.equal(before)


def test_temperature_0_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert truncate(logits, temperature=0.0).tolist() == [[0, 1, 0, 0]]


def test_parameters_that_almost_vanish_give_no_nan() -> None:
    """Logits divided by such a temperature overflow; top_p rounds to 0 in float32."""
    logits = torch.tensor([[50.0, 80.0, -math.inf, 80.0]])
    assert truncate(logits, temperature=1e-37).tolist() == [[0, 0.5, 0, 0.5]]
    assert truncate(logits[:, :2], top_p=1e-60).tolist() == [[0, 1]]


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    expected = torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0]])
    torch.testing.assert_close(truncate(logits, top_k=2), expected)
    torch.testing.assert_close(truncate(logits, top_p=0.3), expected)


def test_dtypes() -> None:
    logits = torch.randn(2, 9)
    assert truncate(logits.bfloat16()).dtype == torch.float32
    assert truncate(logits.bfloat16(), temperature=0.0).dtype == torch.float32
    assert truncate(logits.double(), min_p=0.1).dtype == torch.float64


# ---- log-probabilities


def test_token_logprobs() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    found = [token_logprobs(logits[i : i + 1], [t], top)[0] for i, (t, top) in enumerate(((2, 2), (0, 0), (0, 20)))]
    rows = logits.double().log_softmax(-1).tolist()
    assert [f.logprob for f in found] == pytest.approx([rows[0][2], rows[1][0], rows[2][0]])
    assert [list(f.top) for f in found] == [[1, 2], [], [2, 1, 0]]  # the likeliest first
    for row, one in zip(rows, found):
        assert list(one.top.values()) == pytest.approx([row[i] for i in one.top])


# ---- categorical


def test_categorical_inverts_the_cdf() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(5, -1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert categorical(probs, u).tolist() == [1, 1, 3, 4, 4]
    assert categorical(probs * 7, u).tolist() == [1, 1, 3, 4, 4]


def test_categorical_never_returns_probability_0() -> None:
    """Many tiny probabilities whose float32 sum is far from 1, zeros at both ends, u rounded up to 1."""
    probs = torch.rand(200, 50_000, generator=torch.Generator().manual_seed(0))
    probs = probs * (probs > 0.5) / probs.sum(-1, keepdim=True)
    probs[:, :100] = probs[:, -100:] = 0
    for u in (0.0, 1 - 2**-53, 1.0):
        ids = categorical(probs, torch.full((200,), u, dtype=torch.float64))
        assert (probs.gather(1, ids[:, None]) > 0).all()


def test_categorical_resolves_probabilities_below_float32_rounding() -> None:
    probs = torch.tensor([[1.0, 1e-9]])
    assert categorical(probs, torch.tensor([1 - 5e-10], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("vocab", [5, 64, 300, 512])
def test_categorical_never_leaves_the_vocabulary(vocab: int) -> None:
    """A broken model's probabilities are NaN; an id past the vocabulary would stop the engine for everyone."""
    probs = torch.full((2, vocab), math.nan)
    probs[1] = 0.0
    assert (categorical(probs, torch.tensor([0.5, 0.999])) < vocab).all()


def test_categorical_frequencies() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.bincount(categorical(probs.expand(10_000, -1), u)).tolist() == [1000, 0, 6000, 3000]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), vocab=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_first_maximum_is_argmax(rows: int, vocab: int, seed: int):
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).round()  # many ties
    assert torch.equal(first_maximum(values), values.argmax(-1))


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 700), u=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_draw_in_blocks_is_the_draw_of_the_whole_cumulative_sum(vocab: int, u: float, seed: int):
    probs = torch.rand(1, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    probs[0, 1:][probs[0, 1:] < 0.5] = 0
    drawn = int(categorical(probs, torch.tensor([u], dtype=torch.float64)))
    cumulative = probs[0].cumsum(-1)
    below = float(cumulative[drawn] - probs[0, drawn])
    assert probs[0, drawn] > 0
    assert below - 1e-9 <= u * float(cumulative[-1]) <= float(cumulative[drawn]) + 1e-9
