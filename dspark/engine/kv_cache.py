"""The KV cache: one arena of token slots, a contiguous region of it for each request.

Contiguous regions let attention read a request's keys in place; a CPU has no use for pages. A request
reserves all that it may ever need when it is admitted, so a running request never waits for memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.models.config import DecoderConfig


@dataclass
class Region:
    """Slots start .. start+capacity of the arena; the first `length` of them hold committed tokens."""

    start: int
    capacity: int
    length: int = 0


class KVCache:
    """Target keys and values for `num_slots` tokens, and the account of who owns which slots.

    `storage[layer]` is [num_slots, 2, K, D]: keys and values after rotation.
    """

    def __init__(self, config: DecoderConfig, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.num_slots = num_slots
        shape = (num_slots, 2, config.num_kv_heads, config.head_dim)
        self.storage = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._regions: list[Region] = []  # sorted by start

    @property
    def used_slots(self) -> int:
        return sum(r.capacity for r in self._regions)

    def reserve(self, capacity: int) -> Region | None:
        """The first gap that fits, or None if there is none; the region stays valid until `release`."""
        start = 0
        for i, region in enumerate([*self._regions, Region(self.num_slots, 0)]):
            if region.start - start >= capacity:
                reserved = Region(start, capacity)
                self._regions.insert(i, reserved)
                return reserved
            start = region.start + region.capacity
        return None

    def release(self, region: Region) -> None:
        index = next(i for i, r in enumerate(self._regions) if r is region)
        del self._regions[index]

    def truncate(self, region: Region, length: int) -> None:
        """Forget all tokens of the region past `length`; what was written there is overwritten later."""
        assert 0 <= length <= region.capacity
        region.length = length

    def view(self, layer: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, K, D] from slot `start` on, in place."""
        stored = self.storage[layer][start : start + length]
        return stored[:, 0], stored[:, 1]

    def check_integrity(self) -> None:
        """Regions lie in the arena, in order, without overlap, and none holds more than its capacity."""
        end = 0
        for region in self._regions:
            assert region.start >= end, f"{region} overlaps the region before it"
            assert 0 <= region.length <= region.capacity, f"{region} holds more than it reserved"
            end = region.start + region.capacity
        assert end <= self.num_slots, "a region reaches past the arena"


def slot_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache of this model."""
    return config.num_layers * 2 * config.kv_size * dtype.itemsize
