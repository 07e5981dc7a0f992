"""bf16 arithmetic end to end, as on a CPU with bf16 instructions that cannot run the compiled operations."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dspark.engine.engine import Engine
from dspark.engine.profile import ProfileConfig, measure_costs
from dspark.models import cpu_ops, decoder
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from tests.tiny import tiny_drafter, tiny_target


@pytest.fixture
def bf16_arithmetic(monkeypatch):
    monkeypatch.setattr(cpu_ops, "available", lambda: False)
    monkeypatch.setattr(decoder, "storage_dtype", lambda dtype, device: dtype)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_everything_runs_in_bf16_arithmetic(bf16_arithmetic, temperature):
    target = tiny_target(torch.bfloat16)
    assert target.compute_dtype is torch.bfloat16
    engine = Engine(target, tiny_drafter(target))
    assert engine.cache.storage[0].dtype is torch.bfloat16
    params = SamplingParams(temperature=temperature, max_new_tokens=12, seed=0)
    sequences = [engine.add(list(range(3, 10 + i)), params) for i in range(3)]
    while engine.has_work:
        engine.step()
        engine.cache.check_integrity()
    assert [len(s.output_ids) for s in sequences] == [12] * 3


def test_costs_are_measured_in_bf16_arithmetic(bf16_arithmetic):
    target = tiny_target(torch.bfloat16)
    loaded = cast(Target, SimpleNamespace(source=SimpleNamespace(name="tiny"), decoder=target))
    table = measure_costs(loaded, tiny_drafter(target), ProfileConfig((1, 3), (1,), repeats=1, context=6))
    assert table.draft_seconds[0] > 0
