"""The KV cache's account of slots, under any order of reserving, committing, truncating and releasing."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from dspark.engine.kv_cache import KVCache, Region, slot_bytes
from tests.tiny import tiny_config

CONFIG = tiny_config(num_layers=1)


def make_cache(num_slots: int) -> KVCache:
    return KVCache(CONFIG, num_slots, torch.float32, torch.device("cpu"))


class Account(RuleBasedStateMachine):
    """Beside the cache runs the naive account: the set of slots that each live region owns."""

    regions = Bundle("regions")

    @initialize(num_slots=st.integers(1, 40))
    def start(self, num_slots: int) -> None:
        self.cache = make_cache(num_slots)
        self.free = set(range(num_slots))
        self.live: list[Region] = []

    @rule(target=regions, capacity=st.integers(1, 20))
    def reserve(self, capacity: int):
        longest = gap = 0
        for slot in range(self.cache.num_slots):
            gap = gap + 1 if slot in self.free else 0
            longest = max(longest, gap)
        region = self.cache.reserve(capacity)
        assert (region is not None) == (longest >= capacity)
        if region is None:
            return multiple()
        owned = set(range(region.start, region.start + capacity))
        assert owned <= self.free
        assert region.length == 0
        self.free -= owned
        self.live.append(region)
        return region

    @rule(region=regions, share=st.floats(0, 1))
    def commit_or_truncate(self, region: Region, share: float) -> None:
        length = round(share * region.capacity)
        self.cache.truncate(region, length)
        assert region.length == length

    @rule(region=consumes(regions))
    def release(self, region: Region) -> None:
        self.cache.release(region)
        self.free |= set(range(region.start, region.start + region.capacity))
        self.live = [r for r in self.live if r is not region]

    @invariant()
    def accounts_agree(self) -> None:
        self.cache.check_integrity()
        assert self.cache.used_slots <= self.cache.num_slots
        assert len(self.free) + self.cache.used_slots == self.cache.num_slots
        assert self.cache.used_slots == sum(r.capacity for r in self.live)


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_view_is_in_place():
    """Attention reads what was stored without a copy, and writing through one sees the other."""
    cache = make_cache(8)
    cache.storage[0].copy_(torch.arange(cache.storage[0].numel()).view(cache.storage[0].shape))
    keys, values = cache.view(0, 2, 3)
    assert keys.shape == values.shape == (3, CONFIG.num_kv_heads, CONFIG.head_dim)
    assert torch.equal(keys, cache.storage[0][2:5, 0])
    assert torch.equal(values, cache.storage[0][2:5, 1])
    assert keys.untyped_storage().data_ptr() == cache.storage[0].untyped_storage().data_ptr()


def test_slot_bytes_is_what_the_arena_takes():
    cache = make_cache(8)
    assert sum(t.nbytes for t in cache.storage) == 8 * slot_bytes(CONFIG, torch.float32)
