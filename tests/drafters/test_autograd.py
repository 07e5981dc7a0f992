"""Attention and norm with gradients in closed form equal their formulas written out for autograd.

Shapes as in `drafters/autograd.py`.
"""

import pytest
import torch
from torch import Tensor

from dspark.drafters.autograd import BlockAttention

S, K, A, N, B, T, D = 2, 3, 4, 6, 5, 9, 8


def attention_case(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs of `BlockAttention`; the first block of all sees no context."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(S * K, A * N, D), (S * K, T, D), (S * K, T, D), (S * K * A, B, D), (S * K * A, B, D)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[0] *= D**-0.5
    anchors = torch.randint(0, T, (S, A), generator=generator)
    anchors[0, 0] = 0
    return [t.to(dtype).requires_grad_() for t in inputs], torch.arange(T) < anchors[..., None]


def plain_attention(q: Tensor, k_context: Tensor, v_context: Tensor, k_block: Tensor, v_block: Tensor, mask: Tensor):
    """Each block on its own: keys of context and block side by side, one softmax."""
    out = torch.empty_like(q)
    for z in range(S * K):
        for a in range(A):
            rows = slice(a * N, (a + 1) * N)
            seen = mask[z // K, a]
            keys = torch.cat([k_context[z, seen], k_block[z * A + a]])
            values = torch.cat([v_context[z, seen], v_block[z * A + a]])
            out[z, rows] = (q[z, rows] @ keys.T).softmax(-1) @ values
    return out


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_attention(dtype: torch.dtype, atol: float):
    (inputs, mask), (exact, _) = attention_case(dtype), attention_case(torch.float64)
    ours, expected = BlockAttention.apply(*inputs, mask), plain_attention(*exact, mask)  # pyright: ignore
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=0)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(ours, inputs, weight.to(dtype)), torch.autograd.grad(expected, exact, weight)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2 * atol, rtol=0)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    inputs, mask = attention_case(torch.float32)
    with torch.no_grad():
        inputs[0] *= 500
    out = BlockAttention.apply(*inputs, mask)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, plain_attention(*inputs, mask), atol=1e-4, rtol=1e-4)  # pyright: ignore
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))
