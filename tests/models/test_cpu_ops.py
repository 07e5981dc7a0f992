"""The compiled operations: right for any shape, and blind to the rows beside a row."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dspark.models import cpu_ops
from dspark.models.cpu_chunks import AttentionShape, Chunks, attend_chunks
from dspark.models.cpu_ops import CompiledLinear, available
from dspark.models.layers import apply_rotary, rotary_table
from dspark.sampling import relative_weights

pytestmark = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


@pytest.fixture(params=["all instructions of this CPU", "without tiles", "without bf16 dot products"])
def instructions(request, monkeypatch):
    """Every way to multiply with bf16 weights, of those this CPU has."""
    if request.param.startswith("without"):
        compiler = cpu_ops.compiler()
        dots = compiler.machine.bf16_dots and request.param == "without tiles"
        machine = dataclasses.replace(compiler.machine, bf16_dots=dots, bf16_tiles=False)
        monkeypatch.setattr(compiler, "machine", machine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), inputs=st.integers(1, 300), outputs=st.integers(1, 200), seed=st.integers(0, 2**31))
@example(rows=13, inputs=144, outputs=70, seed=1)
@example(rows=1, inputs=16, outputs=1, seed=3)
@example(rows=37, inputs=96, outputs=70, seed=5)
def test_equals_the_product_in_float64(instructions, rows: int, inputs: int, outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16 if seed % 2 else torch.float32)
    x = torch.randn(rows, inputs, generator=generator)
    linear = CompiledLinear(weight)
    read = x.to(torch.bfloat16) if linear.rounds_inputs else x
    expected = read.double() @ weight.double().T
    bound = 1e-6 * (x.double().abs() @ weight.double().abs().T)
    y = linear(x)
    assert y.shape == (rows, outputs) and y.is_contiguous()
    assert bool(((y - expected).abs() <= bound + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(33, 7), (960, 576), (4096, 64), (50, 48)])
def test_a_row_does_not_depend_on_its_neighbours(instructions, shape: tuple[int, int], dtype: torch.dtype):
    linear = CompiledLinear(torch.randn(*shape).to(dtype))
    x = torch.randn(49, shape[1])
    together = linear(x)
    for rows in range(1, 50):
        assert torch.equal(linear(x[:rows]), together[:rows])
    assert torch.equal(linear(x[17:18]), together[17:18])


def test_strided_and_empty_input():
    linear = CompiledLinear(torch.eye(5))
    x = torch.randn(6, 10)
    assert torch.equal(linear(x[:, ::2]), x[:, ::2])
    assert linear(x[:0, :5]).shape == (0, 5)


def test_every_bf16_value_survives():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    y = CompiledLinear(finite[:, None])(torch.ones(1, 1))
    assert torch.equal(y[0], finite.float())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_norm_activation_and_rotation_match_pytorch(rows: int, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 96, generator=generator) * scale
    weight = torch.randn(96, generator=generator)
    torch.testing.assert_close(cpu_ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(cpu_ops.silu_mul(x), F.silu(gate) * up, atol=1e-6, rtol=1e-5)
    heads = x.view(rows, 6, 16).clone()
    table, positions = rotary_table(70, 16, 1e4, torch.device("cpu")), torch.randperm(70, generator=generator)[:rows]
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    expected = torch.cat([apply_rotary(heads[:, :4], cos, sin), heads[:, 4:]], 1)
    cpu_ops.rotate_(heads, 4, table, positions)
    torch.testing.assert_close(heads, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, kv_heads, head_dim", [(3, 3, 64), (1, 2, 8), (4, 1, 24), (7, 2, 128), (1, 1, 64)])
def test_attention_matches_softmax_in_float64(
    instructions, group: int, kv_heads: int, head_dim: int, dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(400, 2, kv_heads, head_dim, generator=generator)
    kv[7] *= 30  # scores of several hundred
    kv[390:] = torch.nan  # of no request
    kv = kv.to(dtype)
    segments = [(1, 0, 1, True), (5, 5, 37, True), (20, 100, 200, True), (4, 100, 16, False), (2, 381, 9, True)]
    segments += [(3, 64, 32, True), (2, 390 - 47, 47, False)]
    count = sum(s[0] for s in segments)
    heads = torch.randn(count, group * kv_heads + 3, head_dim, generator=generator)
    q = heads[:, : group * kv_heads]  # rows are strided, as in a fused product
    shape = AttentionShape(kv_heads, group, head_dim, dtype is torch.bfloat16)
    out = attend_chunks(q, kv, Chunks.of(segments, shape))
    row = 0
    for rows, start, length, causal in segments:
        for i in range(rows):
            n = length - (rows - 1 - i) * causal
            keys, values = kv[start : start + n].double().repeat_interleave(group, 2).unbind(1)
            query = q[row] * head_dim**-0.5
            if shape.rounds_inputs:
                query = query.to(torch.bfloat16)
            weights = torch.einsum("hd,thd->ht", query.double(), keys).softmax(-1)
            expected = torch.einsum("ht,thd->hd", weights, values).flatten()
            # There each weight is rounded to bf16 too, which is off by 2**-8 of it at most.
            rounding = torch.einsum("ht,thd->hd", weights, values.abs()).flatten() * 2**-8 * shape.rounds_inputs
            assert bool(((out[row] - expected).abs() <= 5e-5 + 2e-5 * expected.abs() + rounding).all())
            alone = attend_chunks(q[row : row + 1], kv, Chunks.of([(1, start, n, True)], shape))
            assert torch.equal(alone[0], out[row])
            row += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_holds_the_nearest_numbers(dtype: torch.dtype):
    x = torch.cat([torch.randn(5, 2, 2, 8), torch.full((1, 2, 2, 8), torch.nan), torch.full((1, 2, 2, 8), torch.inf)])
    rows = torch.cat([torch.zeros(7, 3, 2, 8), x], 1)[:, 3:]  # strided
    cache = torch.zeros(9, 2, 2, 8, dtype=dtype)
    slots = torch.tensor([8, 0, 3, 4, 6, 2, 5])
    cpu_ops.store(rows, cache, slots)
    expected = torch.zeros_like(cache).index_copy_(0, slots, x.to(dtype))
    assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("width", [3, 64, 1000])
def test_relative_weights_are_those_of_sampling(width: int):
    x = 20 * torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    x[1, 0], x[2] = -math.inf, 3.0
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.01, 1e-45, 1e30, 0.7, 2.0, 1.0])
    expected = relative_weights(x.clone(), temperature)
    found = cpu_ops.relative_weights(x.clone(), temperature)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0, equal_nan=True)
    assert ((found == 0) == (expected == 0)).all()
    broken = torch.tensor([[math.nan, 1.0, 1.0], [math.inf, 1.0, 2.0], [-math.inf, -math.inf, -math.inf]])
    found = cpu_ops.relative_weights(broken, torch.ones(3))
    assert torch.equal(found, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("width", [1, 17, 48, 49152])
def test_first_maximum_takes_the_first_of_equals(width: int):
    x = torch.randint(0, 40, (9, width)).float()
    x[3] = -torch.inf
    x[4, :: max(1, width // 3)] = torch.inf
    expected = torch.tensor([row.tolist().index(max(row.tolist())) for row in x])
    assert torch.equal(cpu_ops.first_maximum(x), expected)
    x[5] = torch.nan
    assert 0 <= cpu_ops.first_maximum(x)[5] < width
