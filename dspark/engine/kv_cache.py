"""The KV cache: one arena of token slots, a contiguous region of it for each request.

Contiguous regions let attention read a request's keys in place; a CPU has no use for pages. A region starts with
room for the tokens there are and a few more, and grows with its request. What a finished request computed stays
known until its slots are needed, so that a later request with the same leading tokens copies instead of computing.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dspark.models.attention import copy_slots
from dspark.models.config import DecoderConfig

if TYPE_CHECKING:
    from dspark.engine.drafter_context import DrafterContext

MIN_REUSED = 16  # shorter prefixes are computed again


@dataclass(eq=False)
class Region:
    """Slots start .. start+capacity of the arena; the first `length` of them hold token_ids[:length], none once it is
    given up.

    It may grow up to `limit` slots: while memory allows, no other region is put there. `token_ids` is the list of
    the request itself, which only ever grows, as long as the request owns the region.
    """

    start: int
    capacity: int
    limit: int
    token_ids: list[int]
    length: int = 0

    def overlaps(self, start: int, capacity: int) -> bool:
        return self.start < start + capacity and start < self.start + self.capacity


class KVCache:
    """Target keys and values for `num_slots` tokens, and the account of who owns which slots.

    `storage[layer]` is [num_slots, 2, K, D]: keys and values after rotation.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        companion: "DrafterContext | None" = None,
        reuse: bool = True,
    ):
        """companion: what a drafter stores for the same slots, copied along. reuse: whether computed prefixes are."""
        self.num_slots, self.companion, self.reuse = num_slots, companion, reuse
        shape = (num_slots, 2, config.num_kv_heads, config.head_dim)
        self.storage = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._owned: list[Region] = []
        self._kept: list[Region] = []  # of finished requests: free memory, least recently used first

    @property
    def used_slots(self) -> int:
        """Slots that requests own; all others are free, those kept for reuse too."""
        return sum(r.capacity for r in self._owned)

    @property
    def kept_slots(self) -> int:
        return sum(r.capacity for r in self._kept)

    def reserve(self, token_ids: list[int], capacity: int, limit: int) -> Region | None:
        """A region whose first `length` slots already hold what is known of the tokens; None if it fits nowhere.

        At least the last token is left to compute. The region is the caller's until `release`; it may move in `grow`.
        """
        source, count = self._longest_match(token_ids[:-1])
        start = self._place(capacity, limit)
        if start is None:
            return None
        region = Region(start, capacity, limit, token_ids)
        if source is not None and self.companion is not None:
            self.companion.take_in([source])  # it is about to be copied
        self._drop_kept(lambda r: r.overlaps(start, capacity))
        if source is not None:
            # It may just have been dropped and even overlap the new region: nothing has overwritten it yet.
            self._copy(source.start, start, count)
            region.length = count
        self._owned.append(region)
        return region

    def grow(self, region: Region, capacity: int) -> bool:
        """Enlarge a region, where it lies or elsewhere; False, and nothing changed, if it fits nowhere."""
        behind = min((r.start for r in self._owned if r.start > region.start), default=self.num_slots)
        in_place = behind - region.start >= capacity
        start = region.start if in_place else self._place(capacity, region.limit, moving=region)
        if start is None:
            return False
        self._drop_kept(lambda r: r.overlaps(start, capacity))
        self._copy(region.start, start, region.length)
        region.start, region.capacity = start, capacity
        return True

    def truncate(self, region: Region, length: int) -> None:
        """Set how many tokens of the region are computed; what was written past them is overwritten later."""
        assert 0 <= length <= region.capacity
        region.length = length

    def release(self, region: Region) -> None:
        """Make the region free memory; its tokens stay known until others need the slots."""
        self._owned.remove(region)
        region.token_ids = region.token_ids[: region.length]  # a request that stopped has fewer tokens than KV
        region.length = region.capacity = region.limit = len(region.token_ids)
        if self.reuse and region.length >= MIN_REUSED:
            self._drop_kept(lambda r: r.token_ids == region.token_ids[: r.length])
            self._kept.append(region)
        else:
            region.length = 0

    def check_integrity(self) -> None:
        """Regions lie in the arena without overlap, and none holds more than its capacity."""
        end = 0
        for region in sorted(self._owned + self._kept, key=lambda r: r.start):
            assert region.start >= end, f"{region} overlaps the region before it"
            assert 0 <= region.length <= region.capacity <= region.limit, f"{region} holds more than it reserved"
            end = region.start + region.capacity
        assert end <= self.num_slots, "a region reaches past the arena"
        assert all(r.length == r.capacity == len(r.token_ids) for r in self._kept)
        assert self.used_slots + self.kept_slots <= self.num_slots

    def _longest_match(self, token_ids: list[int]) -> tuple[Region | None, int]:
        """The region that knows most of the leading tokens, now the last to be dropped, and how many of them."""
        best, most, head = None, MIN_REUSED - 1, token_ids[:MIN_REUSED]
        for region in self._kept + self._owned if self.reuse else []:
            if region.token_ids[:MIN_REUSED] != head:  # most are of other prompts
                continue
            count = common_prefix(token_ids, region.token_ids, region.length)
            if count > most:
                best, most = region, count
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)
        return best, most

    def _place(self, capacity: int, limit: int, moving: Region | None = None) -> int | None:
        """First slot of a gap for `limit` slots or, where there is none, for `capacity`; None if there is none either.

        A gap may reach over kept regions and over `moving` itself. As few kept regions as possible, least recently
        used first, are in question; only those that really lie in the way need to go.
        """
        owned = [r for r in self._owned if r is not moving]

        def gap(size: int, soft: bool, without: int) -> int | None:
            """Without so many of the kept regions. soft: other regions are to have room to grow."""
            start = 0
            for region in sorted(owned + self._kept[without:], key=lambda r: r.start):
                if region.start - start >= size:
                    return start
                start = max(start, region.start + (region.limit if soft else region.capacity))
            return start if self.num_slots - start >= size else None

        for size, soft in ((limit, True), (capacity, False)):
            fewest = bisect_left(range(len(self._kept)), True, key=lambda n: gap(size, soft, n) is not None)
            if (start := gap(size, soft, fewest)) is not None:
                return start
        return None

    def _drop_kept(self, goes: Callable[[Region], bool]) -> None:
        """Forget regions; whoever still holds one sees that it is empty."""
        for region in filter(goes, self._kept):
            region.length = 0
        self._kept = [r for r in self._kept if r.length]

    def _copy(self, source: int, target: int, count: int) -> None:
        if source != target and count:
            copy_slots(self.storage, source, target, count)
            if self.companion is not None:
                self.companion.copy(source, target, count)


def common_prefix(a: list[int], b: list[int], most: int) -> int:
    """How many of the first `most` tokens of both are the same, by bisection over slices."""
    low, high = 0, min(len(a), len(b), most)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def slot_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache of this model."""
    return config.num_layers * 2 * config.kv_size * dtype.itemsize
