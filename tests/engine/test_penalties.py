"""With penalties, bias and minimum length greedy output is that of the plainest loop, whatever the drafter."""

import random

import pytest

from dspark.drafters.interface import Drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.sampling import SamplingParams
from tests.engine.plain import AdjustedTarget, plain_answer
from tests.tiny import AdversarialDrafter, OracleDrafter, plain_logits, tiny_drafter, tiny_target

TARGET = tiny_target()
EOS = frozenset({5, 17, 40})
LENGTH = 6  # of every prompt
PLAIN = AdjustedTarget(TARGET, LENGTH, EOS)
PROMPTS = [[random.Random(i).randrange(64) for _ in range(LENGTH)] for i in range(8)]
SETTINGS = {
    "presence": SamplingParams(max_new_tokens=16, presence_penalty=1.5),
    "frequency": SamplingParams(max_new_tokens=16, frequency_penalty=0.9),
    "rewarded": SamplingParams(max_new_tokens=16, frequency_penalty=-0.9, repetition_penalty=0.9),
    "repetition": SamplingParams(max_new_tokens=16, repetition_penalty=1.6),
    "bias": SamplingParams(max_new_tokens=16, logit_bias={3: 2.0, 9: 1.0, 20: -100.0}),
    "minimum": SamplingParams(max_new_tokens=16, min_new_tokens=7, logit_bias=dict.fromkeys(EOS, 6.0)),
    "plain": SamplingParams(max_new_tokens=16),
}


def knowing(drafter: OracleDrafter) -> OracleDrafter:
    """Identical to the target after penalties."""
    drafter.plain = PLAIN
    return drafter


DRAFTERS = {
    "none": lambda: None,
    "ngram": lambda: NgramDrafter(4, min_ngram=1),
    "random": lambda: tiny_drafter(TARGET),
    "adversarial": lambda: knowing(AdversarialDrafter(TARGET)),
    "identical": lambda: knowing(OracleDrafter(TARGET)),
    "identical before penalties": lambda: OracleDrafter(TARGET),
}


def make_engine(drafter: Drafter | None) -> Engine:
    return Engine(TARGET, drafter, eos_ids=EOS, config=EngineConfig(max_streams=8, max_model_len=96))


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.cache.check_integrity()


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_output_equals_the_plain_loop(drafter: str):
    """All settings side by side in one batch, so that each row must find its own."""
    engine = make_engine(DRAFTERS[drafter]())
    cases = [(prompt, params) for prompt in PROMPTS[:4] for params in SETTINGS.values()]
    sequences = [engine.add(prompt, params) for prompt, params in cases]
    run(engine)
    for sequence, (prompt, params) in zip(sequences, cases, strict=True):
        expected = plain_answer(PLAIN, prompt, params, lambda ids: "")
        assert sequence.output_ids == expected.token_ids
        assert (sequence.finish_reason, sequence.stopped_by) == (expected.finish_reason, expected.stopped_by)


def test_every_setting_changes_something():
    """Otherwise the test above would compare nothing."""
    for name, params in SETTINGS.items():
        answers = [plain_answer(PLAIN, prompt, params, lambda ids: "").token_ids for prompt in PROMPTS[:4]]
        plain = [plain_answer(PLAIN, prompt, SETTINGS["plain"], lambda ids: "").token_ids for prompt in PROMPTS[:4]]
        assert (answers == plain) == (name == "plain"), name


def test_a_drafter_that_knows_the_penalties_is_never_rejected():
    engine = make_engine(knowing(OracleDrafter(TARGET)))
    params = SamplingParams(1.0, seed=3, max_new_tokens=16, ignore_eos=True, frequency_penalty=1.0)
    sequence = engine.add(PROMPTS[0], params)
    run(engine)
    assert (sequence.rounds, sequence.accepted_tokens) == (3, 12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {64: 1.0}}, r"logit_bias holds token ids outside 0\.\.63"),
        ({"stop_token_ids": (64,)}, r"stop_token_ids holds token ids outside 0\.\.63"),
        ({"stop_token_ids": tuple(range(64)), "min_new_tokens": 1}, "every token of the model is an end token"),
        ({"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_parameters_impossible_for_the_model_are_refused(params: dict, message: str):
    engine = make_engine(None)
    with pytest.raises(ValueError, match=message):
        engine.add(PROMPTS[0], SamplingParams(max_new_tokens=8, **params))
    assert not engine.has_work


@pytest.mark.parametrize("drafter", ["none", "random", "identical"])
def test_logprobs_are_the_targets_own(drafter: str):
    """Of the chosen and the likeliest tokens, before penalties and temperature; only for requests that ask."""
    engine = make_engine(DRAFTERS[drafter]())
    counts = (0, 4, None, 20)
    sequences = [
        engine.add(
            PROMPTS[i],
            SamplingParams(
                float(i % 2), seed=i, max_new_tokens=9, ignore_eos=True, top_k=5, presence_penalty=1.0, logprobs=k
            ),
        )
        for i, k in enumerate(counts)
    ]
    run(engine)
    for sequence, k in zip(sequences, counts, strict=True):
        assert len(sequence.logprobs) == (0 if k is None else 9)
        for i, (logprob, top) in enumerate(sequence.logprobs):
            row = plain_logits(TARGET, sequence.token_ids[: LENGTH + i])[-1].double().log_softmax(-1)
            assert logprob == pytest.approx(float(row[sequence.output_ids[i]]), abs=1e-4)
            assert list(top.values()) == pytest.approx(row.sort(descending=True).values[:k].tolist(), abs=1e-4)
            assert list(top.values()) == pytest.approx(row[list(top)].tolist(), abs=1e-4)
