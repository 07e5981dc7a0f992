"""The compiled operations: right for any shape, and blind to the rows beside a row."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dspark.models import cpu_ops, layers
from dspark.models.attention import store
from dspark.models.cpu_chunks import AttentionShape, Chunks, attend_chunks
from dspark.models.cpu_ops import CompiledLinear, available
from dspark.models.layers import apply_rotary, rotary_table
from dspark.sampling import truncated_probs
from dspark.spec.draft import Draft
from dspark.spec.verify import verify

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
@torch.inference_mode()
def test_norm_activation_and_rotation_match_pytorch(rows: int, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 96, generator=generator) * scale
    weight = torch.randn(96, generator=generator)
    torch.testing.assert_close(layers.rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(layers.silu_mul(x), F.silu(gate) * up, atol=1e-6, rtol=1e-5)
    heads = x.view(rows, 6, 16).clone()
    table, positions = rotary_table(70, 16, 1e4, torch.device("cpu")), torch.randperm(70, generator=generator)[:rows]
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    expected = torch.cat([apply_rotary(heads[:, :4], cos, sin), heads[:, 4:]], 1)
    layers.rotate_(heads, 4, table, positions)
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
    rounds_inputs = shape.tiled or shape.in_pairs
    out = attend_chunks(q, kv, Chunks.of(segments, shape))
    row = 0
    for rows, start, length, causal in segments:
        for i in range(rows):
            n = length - (rows - 1 - i) * causal
            keys, values = kv[start : start + n].double().repeat_interleave(group, 2).unbind(1)
            query = q[row] * head_dim**-0.5
            if rounds_inputs:
                query = query.to(torch.bfloat16)
            weights = torch.einsum("hd,thd->ht", query.double(), keys).softmax(-1)
            expected = torch.einsum("ht,thd->hd", weights, values).flatten()
            # There each weight is rounded to bf16 too, which is off by 2**-8 of it at most.
            rounding = torch.einsum("ht,thd->hd", weights, values.abs()).flatten() * 2**-8 * rounds_inputs
            assert bool(((out[row] - expected).abs() <= 5e-5 + 2e-5 * expected.abs() + rounding).all())
            alone = attend_chunks(q[row : row + 1], kv, Chunks.of([(1, start, n, True)], shape))
            assert torch.equal(alone[0], out[row])
            row += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_cache_holds_the_nearest_numbers(dtype: torch.dtype):
    x = torch.cat([torch.randn(5, 2, 2, 8), torch.full((1, 2, 2, 8), torch.nan), torch.full((1, 2, 2, 8), torch.inf)])
    rows = torch.cat([torch.zeros(7, 3, 2, 8), x], 1)[:, 3:]  # strided
    cache = torch.zeros(9, 2, 2, 8, dtype=dtype)
    slots = torch.tensor([8, 0, 3, 4, 6, 2, 5])
    store(rows, cache, slots)
    expected = torch.zeros_like(cache).index_copy_(0, slots, x.to(dtype))
    assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


FILTERS = [  # temperature, top-k, top-p, min-p
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 0.5, 0.0),
    (0.2, 0, 0.9, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.5, 40, 0.7, 0.0),
    (1.0, 0, 0.999, 0.01),
    (3.0, 0, 1.0, 0.2),
    (2.0, 10**6, 1e-60, 0.0),
    (0.01, 1, 1.0, 0.0),
    (1e-45, 0, 1.0, 0.0),
    (1e30, 2, 1.0, 0.0),
    (1e30, 0, 0.3, 0.0),
]


@pytest.mark.parametrize("width", [3, 64, 1000, 20_000])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_truncated_probs_are_those_of_sampling(width: int, spread: float):
    """Where few tokens are likely and where nearly all are, each row by its own settings."""
    settings = np.array(FILTERS, np.float32)
    x = spread * torch.randn(len(settings), width, generator=torch.Generator().manual_seed(width))
    x[::2, 0] = -math.inf
    expected = truncated_probs(x, *settings.T)
    found = cpu_ops.truncated_probs(x.clone(), settings)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(x)))
    # The end of a nucleus may move by tokens as likely as rounding errors of sums.
    both = (found > 0) & (expected > 0)
    torch.testing.assert_close(found[both], expected[both], rtol=2e-4, atol=0)
    assert (found * (expected == 0)).sum() < 1e-4 and (expected * (found == 0)).sum() < 1e-4
    alone = torch.cat([cpu_ops.truncated_probs(x[i : i + 1].clone(), settings[i : i + 1]) for i in range(len(x))])
    assert torch.equal(alone, found)


def test_truncation_keeps_ties_and_drops_what_is_no_number():
    ties = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(3, 1)
    settings = np.array([(1, 2, 1, 0), (1, 0, 0.3, 0), (1, 0, 1, 0.99)], np.float32)
    expected = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]).expand(3, -1)
    torch.testing.assert_close(cpu_ops.truncated_probs(ties, settings), expected)
    broken = torch.tensor([[math.nan, 1.0, 1.0], [-math.inf, 1.0, -math.inf]])
    found = cpu_ops.truncated_probs(broken, np.array([(1, 0, 1, 0)] * 2, np.float32))
    assert torch.equal(found, torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]]))


@given(
    st.sampled_from([(5, 3), (64, 1), (64, 8), (1000, 64)]),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_verdicts_are_those_of_the_formulas(sizes: tuple[int, int], verified: list[int], seed: int):
    """Sparse and full rows, some nearly as the draft's; supports that repeat ids with probability 0; several blocks."""
    (vocab, candidates), lengths, generator = sizes, torch.tensor(verified), torch.Generator().manual_seed(seed)
    r, g, rows = len(verified), max(verified), sum(verified) + len(verified)

    def law(*shape: int) -> torch.Tensor:
        weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
        weights[..., 0] += 0.01
        return weights / weights.sum(-1, keepdim=True)

    draft_probs, target_probs = law(r, g, candidates), law(rows, vocab)
    support = torch.rand(r, g, vocab, generator=generator).argsort(-1)[..., :candidates]
    support = torch.where(draft_probs > 0, support, support[..., :1])
    below = torch.rand(r, g, 1, generator=generator) >= draft_probs.cumsum(-1)
    drawn = below.sum(-1, keepdim=True).clamp(max=candidates - 1)
    draft = Draft(support.gather(-1, drawn).squeeze(-1), support, draft_probs, lengths, torch.zeros(r, g, 1))
    row = 0
    for i, length in enumerate(verified):
        for k in range(0, length, 2):
            target_probs[row + k] *= 0.02
            target_probs[row + k].scatter_add_(0, support[i, k], 0.98 * draft_probs[i, k])
        row += length + 1
    accept, own = torch.rand(2, r, g + 1, generator=generator, dtype=torch.float64).numpy()
    expected = verify(target_probs, draft, lengths, accept[:, 1:], own)
    accepted, next_token = cpu_ops.verify(target_probs.clone(), draft, lengths, accept[:, 1:], own)
    assert accepted.tolist() == expected.accepted.tolist()
    assert next_token.tolist() == expected.next_token.tolist()


def test_a_verdict_where_nothing_is_left_is_the_target_itself():
    law = torch.tensor([[0.25, 0.0, 0.75, 0.0]])
    draft = Draft(torch.tensor([[2]]), torch.arange(4)[None, None], law[None], torch.tensor([1]), torch.zeros(1, 1, 1))
    for draw, token in ((0.1, 0), (0.3, 2), (1 - 2**-53, 2)):
        rows, uniforms = law.repeat(2, 1), (np.zeros((1, 1)), np.full((1, 2), draw))
        accepted, next_token = cpu_ops.verify(rows, draft, torch.tensor([1]), *uniforms)
        assert (accepted.tolist(), next_token.tolist()) == ([1], [token])
    rows = torch.full((1, 4), math.nan)
    none = Draft(draft.tokens[:, :0], draft.support[:, :0], law[None, :0], torch.tensor([0]), torch.zeros(1, 0, 1))
    _, next_token = cpu_ops.verify(rows, none, none.lengths, np.zeros((1, 0)), np.full((1, 1), 0.5))
    assert 0 <= next_token.item() < 4


@pytest.mark.parametrize("width", [1, 17, 48, 49152])
def test_first_maximum_takes_the_first_of_equals(width: int):
    x = torch.randint(0, 40, (9, width)).float()
    x[3] = -torch.inf
    x[4, :: max(1, width // 3)] = torch.inf
    expected = torch.tensor([row.tolist().index(max(row.tolist())) for row in x])
    assert torch.equal(cpu_ops.first_maximum(x), expected)
    x[5] = torch.nan
    assert 0 <= cpu_ops.first_maximum(x)[5] < width
