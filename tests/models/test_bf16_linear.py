"""The compiled product: right, for any shape, and blind to the rows beside a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.models.bf16_linear import Bf16Linear, available

pytestmark = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 300), outputs=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_equals_the_product_in_float64(rows: int, inputs: int, outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    x = torch.randn(rows, inputs, generator=generator)
    expected = x.double() @ weight.double().T
    bound = 1e-6 * (x.double().abs() @ weight.double().abs().T)
    y = Bf16Linear(weight)(x)
    assert y.shape == (rows, outputs) and y.is_contiguous()
    assert bool(((y - expected).abs() <= bound + 1e-6).all())


@pytest.mark.parametrize("shape", [(33, 7), (960, 576), (4096, 64)])
def test_a_row_does_not_depend_on_its_neighbours(shape: tuple[int, int]):
    linear = Bf16Linear(torch.randn(*shape))
    x = torch.randn(29, shape[1])
    together = linear(x)
    for rows in range(1, 30):
        assert torch.equal(linear(x[:rows]), together[:rows])
    assert torch.equal(linear(x[17:18]), together[17:18])


def test_strided_and_empty_input():
    linear = Bf16Linear(torch.eye(5))
    x = torch.randn(6, 10)
    assert torch.equal(linear(x[:, ::2]), x[:, ::2])
    assert linear(x[:0, :5]).shape == (0, 5)


def test_every_bf16_value_survives():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    y = Bf16Linear(finite[:, None])(torch.ones(1, 1))
    assert torch.equal(y[0], finite.float())
