"""Batch-invariant mode: the same answer to the last bit with and without drafts, alone and in any batch, in bf16."""

import pytest
import torch

from dspark.engine.engine import Engine, EngineConfig
from dspark.models import cpu_ops
from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams, truncated_probs
from dspark.spec.prefix_scheduler import FixedLength, Threshold
from tests.tiny import tiny_config, tiny_drafter, tiny_state_dict

pytestmark = pytest.mark.skipif(not cpu_ops.available(), reason="needs the compiled operations")

SAMPLINGS = [
    SamplingParams(max_new_tokens=14),
    SamplingParams(temperature=1.0, max_new_tokens=14),
    SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=14, repetition_penalty=1.2),
    SamplingParams(temperature=1.3, top_k=20, min_p=0.02, max_new_tokens=14, presence_penalty=0.5),
]


def target(dtype: torch.dtype) -> Decoder:
    config = tiny_config(vocab_size=200)
    return Decoder(config, tiny_state_dict(config), dtype=dtype, deterministic=True)


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        prompt = torch.randint(3, 200, (3 + 5 * i % 23,), generator=generator).tolist()
        params = SAMPLINGS[i % len(SAMPLINGS)]
        found.append((prompt, SamplingParams(**{**params.__dict__, "seed": i})))
    return found


def answers(engine: Engine, wanted: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    sequences = [engine.add(prompt, params) for prompt, params in wanted]
    while engine.has_work:
        engine.step()
    return [s.output_ids for s in sequences]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_answers_do_not_depend_on_batch_drafter_or_schedule(dtype: torch.dtype):
    decoder = target(dtype)
    wanted = requests(12)
    alone = [answers(Engine(decoder), [one])[0] for one in wanted]
    drafted = 0
    for scheduler, config in (
        (FixedLength(4), EngineConfig()),
        (FixedLength(2), EngineConfig(max_streams=3, prefill_tokens=5)),
        (Threshold(0.3), EngineConfig(max_streams=7, prefill_tokens=11)),
    ):
        engine = Engine(decoder, tiny_drafter(decoder), scheduler, config=config)
        assert answers(engine, wanted) == alone
        drafted += engine.times.verified
    assert drafted > 0
    assert answers(Engine(decoder), wanted[::-1]) == alone[::-1]


def test_logits_are_the_same_bits_in_any_batch():
    decoder = target(torch.bfloat16)
    seen: list[torch.Tensor] = []
    logits = decoder.logits
    decoder.logits = lambda hidden: seen.append(logits(hidden)) or seen[-1]
    prompt = list(range(3, 40))
    answers(Engine(decoder), [(prompt, SamplingParams(max_new_tokens=1))])
    others = [(p, SamplingParams(max_new_tokens=6)) for p, _ in requests(9)]
    answers(
        Engine(decoder, config=EngineConfig(prefill_tokens=8)), [*others, (prompt, SamplingParams(max_new_tokens=1))]
    )
    assert any(torch.equal(row, seen[0][0]) for rows in seen[1:] for row in rows)


def test_probabilities_of_a_row_do_not_depend_on_other_rows():
    logits = torch.randn(5, 49_152, generator=torch.Generator().manual_seed(0)) * 3
    values = [torch.tensor([v] * 5) for v in (0.8, 0, 0.95, 0.0)]
    together = truncated_probs(logits, *values)
    for rows in (2, 3, 4):
        assert torch.equal(truncated_probs(logits[:rows], *[v[:rows] for v in values]), together[:rows])


def test_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_ops, "available", lambda: False)
    with pytest.raises(ValueError, match="deterministic mode needs the compiled operations"):
        target(torch.bfloat16)


@pytest.mark.model
def test_the_real_model_gives_the_same_answers():
    from dspark.engine.llm import LLM

    prompts = ["What is the capital of France?", "Write a haiku about rain.", "def fibonacci(n):", "Why is 17 prime?"]
    each = [SamplingParams(temperature=t, max_new_tokens=24, seed=i) for i, t in enumerate((0.0, 1.0, 0.7, 1.0))]
    plain = LLM(drafter="none", deterministic=True)
    alone = [plain.generate([p], s)[0].token_ids for p, s in zip(prompts, each)]
    fast = LLM(drafter="dspark", policy="fixed-4", deterministic=True)
    assert [a.token_ids for a in fast.generate(prompts, each)] == alone
