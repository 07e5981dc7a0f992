"""Anchors and blocks: which positions start a block, which slots are supervised (design §6).

Shapes: S sequences, T positions, A anchors, G block size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COUNTS = 32  # anchors are padded to a multiple of it, see `drafters.layers.LENGTHS`


@dataclass
class Blocks:
    """anchors [S, A]; supervised [S, A, G]: slot k of the block has a target and all slots before it too."""

    anchors: Tensor
    supervised: Tensor

    def positions(self) -> Tensor:
        """Position whose target distribution slot k is trained towards, anchor + k, [S, A, G]."""
        return self.anchors[..., None] + torch.arange(self.supervised.shape[-1], device=self.anchors.device)


def sample_blocks(
    loss_mask: Tensor, block_size: int, num_anchors: int, generators: Sequence[torch.Generator]
) -> Blocks:
    """Random anchors a with loss_mask[a] and loss_mask[a + 1], at most num_anchors a sequence.

    loss_mask [S, T] bool; a generator for each sequence, so that its anchors depend neither on its company nor on
    padding. All sequences are padded to the same number, a multiple of COUNTS, with unsupervised blocks at 0.
    """
    s, t = loss_mask.shape
    valid = loss_mask[:, :-1] & loss_mask[:, 1:]
    # Random scores order the valid positions before all others; the best num_anchors of each row are taken.
    scores = torch.full(valid.shape, 2.0)
    for row, here, generator in zip(scores, valid.cpu(), generators, strict=True):
        row[here] = torch.rand(int(here.sum()), generator=generator)
    scores = scores.to(valid.device)
    count = min(num_anchors, int(valid.sum(1).max()))
    order = scores.argsort(1)[:, :count]
    padding = 0, -count % COUNTS
    keep = F.pad(valid.gather(1, order), padding)
    anchors = torch.where(keep, F.pad(order, padding), 0)
    targets = anchors[..., None] + 1 + torch.arange(block_size, device=anchors.device)  # [S, A, G]
    inside = (targets < t) & keep[..., None]
    masked = loss_mask.gather(1, targets.clamp(max=t - 1).view(s, -1)).view(targets.shape)
    return Blocks(anchors, (masked & inside).cumprod(-1).bool())
