"""Anchors are drawn where training may begin, and supervision never leaves the answer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.train.blocks import sample_blocks

masks = st.integers(2, 14).flatmap(
    lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1, max_size=4)
)


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(masks, st.integers(1, 6), st.integers(1, 20), st.integers(0, 5))
def test_blocks_keep_to_the_loss_mask(mask: list[list[bool]], block_size: int, num_anchors: int, seed: int):
    """Valid, distinct anchors; the contiguous supervised prefix of each block, written out slot by slot."""
    loss_mask = torch.tensor(mask)
    blocks = sample_blocks(loss_mask, block_size, num_anchors, generators(seed, len(mask)))
    length = loss_mask.shape[1]
    for row, anchors, supervised in zip(mask, blocks.anchors.tolist(), blocks.supervised.tolist()):
        valid = [i for i in range(length - 1) if row[i] and row[i + 1]]
        real = [(a, s) for a, s in zip(anchors, supervised) if any(s)]
        assert len(real) == min(num_anchors, len(valid))
        assert len({a for a, _ in real}) == len(real)
        for anchor, slots in zip(anchors, supervised):
            assert 0 <= anchor < length
            if not any(slots):
                assert anchor == 0  # padding
                continue
            assert anchor in valid
            expected = []
            for k in range(block_size):
                inside = anchor + 1 + k < length and row[anchor + 1 + k]
                expected.append(inside and all(expected))
            assert slots == expected


def test_positions_are_those_of_the_target_s_distributions():
    """Slot k learns from the distribution after position anchor + k, whose token is at anchor + k + 1."""
    blocks = sample_blocks(torch.ones(1, 6, dtype=torch.bool), 3, 2, generators(0, 1))
    for anchor, positions in zip(blocks.anchors[0].tolist(), blocks.positions()[0].tolist()):
        assert positions == [anchor, anchor + 1, anchor + 2]


def test_anchors_do_not_depend_on_company_or_padding():
    masks = torch.zeros(3, 60, dtype=torch.bool)
    for row, length in zip(masks, (20, 60, 33)):
        row[4:length] = True
    together = sample_blocks(masks, 4, 9, generators(7, 3))
    for i, length in enumerate((20, 60, 33)):
        alone = sample_blocks(masks[i : i + 1, :length], 4, 9, generators(7, 3)[i : i + 1])
        assert torch.equal(alone.anchors[0], together.anchors[i])
        assert torch.equal(alone.supervised[0], together.supervised[i])


def test_the_generator_alone_decides():
    mask = torch.ones(2, 50, dtype=torch.bool)
    first, same, other = (sample_blocks(mask, 4, 5, generators(s, 2)).anchors for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_all_valid_anchors_are_drawn_equally_often():
    mask = torch.tensor([[False, True, True, True, False, True, True, False]])
    generator = generators(0, 1)
    counts = torch.zeros(8)
    for _ in range(3000):
        counts[sample_blocks(mask, 2, 1, generator).anchors[0, 0]] += 1
    assert counts.nonzero().flatten().tolist() == [1, 2, 5]
    assert counts[[1, 2, 5]].sub(1000).abs().max() < 110
