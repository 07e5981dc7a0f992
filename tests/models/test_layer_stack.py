"""A stack of layers as one program gives what its layers give one by one, to the last bit."""

import pytest
import torch

from dspark.models.attention import CachedAttention, Segment
from dspark.models.cpu_ops import available
from dspark.models.decoder import Decoder
from dspark.models.layer_stack import LayerStack
from tests.tiny import tiny_config, tiny_state_dict

pytestmark = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_program_equals_layers_one_by_one(dtype: torch.dtype):
    config = tiny_config()
    target = Decoder(config, tiny_state_dict(config), dtype=dtype, deterministic=True)
    stack, one_by_one = (LayerStack(target.layers, target.final_norm) for _ in range(2))
    assert stack._program is not None
    one_by_one._program = None
    shape = (200, 2, config.num_kv_heads, config.head_dim)
    caches = [[torch.zeros(shape, dtype=target.kv_dtype) for _ in target.layers] for _ in range(2)]
    written = 0
    for rows, taps in [(1, ()), (5, (0, 2)), (40, (3,)), (5, (0, 2)), (1, (0, 1, 2, 3)), (17, ())]:
        x = torch.randn(rows, config.hidden_size)
        positions = torch.arange(written, written + rows)
        segments = [Segment(rows, 0, written + rows)] if rows < 17 else [Segment(9, 0, written + 9)]
        segments += [Segment(1, 0, written + rows)] * (rows - sum(s.rows for s in segments))
        written += rows
        results = []
        for storage, run in zip(caches, (stack, one_by_one)):
            attention = CachedAttention(storage, positions, segments, config.group_size)
            results.append(run(x, positions, attention, taps))
        (output, tapped), (expected, expected_taps) = results
        assert torch.equal(output, expected) and tapped.keys() == expected_taps.keys() == set(taps)
        for layer, tap in tapped.items():
            assert torch.equal(tap, expected_taps[layer])
    for ours, theirs in zip(*caches):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_result_outlives_the_next_call():
    config = tiny_config()
    target = Decoder(config, tiny_state_dict(config), deterministic=True)
    stack = LayerStack(target.layers, target.final_norm)
    storage = [torch.zeros(8, 2, config.num_kv_heads, config.head_dim, dtype=target.kv_dtype) for _ in target.layers]

    def run(x: torch.Tensor):
        positions = torch.zeros(1, dtype=torch.int64)
        attention = CachedAttention(storage, positions, [Segment(1, 0, 1)], config.group_size)
        return stack(x, positions, attention, (0, 3))

    output, taps = run(torch.randn(1, config.hidden_size))
    kept = [output.clone(), *(t.clone() for t in taps.values())]
    run(torch.randn(1, config.hidden_size))
    assert all(torch.equal(a, b) for a, b in zip(kept, [output, *taps.values()]))
