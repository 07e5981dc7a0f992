"""The KV cache's account of slots and what lies in them, under any order of reserving, growing and releasing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from dspark.engine.kv_cache import MIN_REUSED, KVCache, Region, common_prefix, slot_bytes
from dspark.models.attention import copy_slots
from tests.tiny import tiny_config

CONFIG = tiny_config(num_layers=1)
# A shared prefix of 0, 20 or 25 tokens, then other ones.
contents = st.builds(
    lambda shared, rest: ([1] * 20 + [2] * 5)[:shared] + rest,
    st.sampled_from([0, 20, 25]),
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
)


def make_cache(num_slots: int, reuse: bool = True) -> KVCache:
    cache = KVCache(CONFIG, num_slots, torch.float32, torch.device("cpu"), reuse=reuse)
    for storage in cache.storage:
        storage.zero_()
    return cache


class Account(RuleBasedStateMachine):
    """Every slot holds its token instead of keys and values, so that a wrong copy is seen; beside the cache runs the
    naive account: the set of slots that no request owns."""

    regions = Bundle("regions")

    @initialize(num_slots=st.integers(1, 150), reuse=st.booleans())
    def start(self, num_slots: int, reuse: bool) -> None:
        self.cache = make_cache(num_slots, reuse)
        self.live: list[Region] = []

    def longest_gap(self, moving: Region | None = None) -> int:
        """Slots in a row that no live region but `moving` owns."""
        owned = {s for r in self.live if r is not moving for s in range(r.start, r.start + r.capacity)}
        longest = gap = 0
        for slot in range(self.cache.num_slots):
            gap = 0 if slot in owned else gap + 1
            longest = max(longest, gap)
        return longest

    @rule(target=regions, tokens=contents, more=st.integers(0, 10), later=st.integers(0, 30), computed=st.booleans())
    def reserve(self, tokens: list[int], more: int, later: int, computed: bool):
        capacity, gap = len(tokens) + more, self.longest_gap()
        region = self.cache.reserve(list(tokens), capacity, capacity + later)
        assert (region is not None) == (gap >= capacity)
        if region is None:
            return multiple()
        assert region.capacity == capacity
        assert region.length == 0 or MIN_REUSED <= region.length < len(tokens)
        self.live.append(region)
        self.every_slot_holds_its_token()
        if computed:
            self.compute_or_truncate(region, 1.0)
        return region

    @rule(region=regions, share=st.floats(0, 1))
    def compute_or_truncate(self, region: Region, share: float) -> None:
        length = round(share * min(region.capacity, len(region.token_ids)))
        self.cache.storage[0][region.start : region.start + length, 0, 0, 0] = torch.tensor(
            region.token_ids[:length], dtype=torch.float32
        )
        self.cache.truncate(region, length)
        assert region.length == length

    @rule(region=regions, share=st.floats(0, 1), tokens=st.lists(st.integers(1, 3), max_size=8))
    def grow(self, region: Region, share: float, tokens: list[int]) -> None:
        capacity = region.capacity + round(share * (region.limit - region.capacity))
        before = (region.start, region.capacity)
        fits = self.longest_gap(region) >= capacity
        assert self.cache.grow(region, capacity) == fits
        if fits:
            assert region.capacity == capacity
            region.token_ids.extend(tokens)
        else:
            assert (region.start, region.capacity) == before

    @rule(region=consumes(regions))
    def release(self, region: Region) -> None:
        self.live = [r for r in self.live if r is not region]
        self.cache.release(region)

    @invariant()
    def accounts_agree(self) -> None:
        self.cache.check_integrity()
        assert self.cache.used_slots == sum(r.capacity for r in self.live)
        assert self.cache.used_slots + self.cache.kept_slots <= self.cache.num_slots
        assert self.cache.reuse or not self.cache.kept_slots

    @invariant()
    def every_slot_holds_its_token(self) -> None:
        for region in self.live + self.cache._kept:
            held = self.cache.storage[0][region.start : region.start + region.length, 0, 0, 0]
            assert held.tolist() == region.token_ids[: region.length]


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def filled(cache: KVCache, tokens: list[int], limit: int | None = None) -> Region:
    """A region with its tokens computed."""
    region = cache.reserve(list(tokens), len(tokens), limit or len(tokens))
    assert region is not None
    cache.truncate(region, len(tokens))
    return region


def test_room_to_grow_is_left_while_there_is_memory():
    cache = make_cache(100)
    first, second = (cache.reserve([1] * 10, 10, 40) for _ in range(2))
    assert first is not None and second is not None
    assert (first.start, second.start) == (0, 40)
    third = cache.reserve([1] * 10, 10, 40)
    assert third is not None and third.start == 10, "where no gap for 40 is left, one for 10 is taken"
    assert cache.grow(second, 40) and second.start == 40
    assert not cache.grow(first, 21), "20 slots in a row are free"
    assert cache.grow(first, 20) and first.start == 20
    cache.check_integrity()


def test_a_region_slides_over_itself_into_free_slots_before_it():
    """Alone in the arena a request must get all of it, wherever it lies; the target range overlaps the source."""
    cache = make_cache(60)
    other, region = filled(cache, [1] * 15), cache.reserve([7] * 30, 30, 60)
    assert region is not None
    for position in range(30):
        cache.storage[0][region.start + position] = position
    cache.truncate(region, 30)
    cache.release(other)
    assert region.start == 15
    assert cache.grow(region, 60) and region.start == 0
    assert cache.storage[0][:30, 0, 0, 0].tolist() == list(range(30))


def test_the_least_recently_used_prefix_goes_first():
    cache = make_cache(90)
    for token in (1, 2, 3):
        cache.release(filled(cache, [token] * 30))
    assert (cache.used_slots, cache.kept_slots) == (0, 90)
    again = cache.reserve([1] * 25 + [9], 26, 26)  # takes the place of 2, and 1 counts as used now
    assert again is not None and again.length == 25
    assert [r.token_ids[0] for r in cache._kept] == [3, 1]
    cache.release(again)


def test_a_longer_prefix_replaces_the_shorter():
    cache = make_cache(90)
    cache.release(filled(cache, [1] * 30))
    cache.release(filled(cache, [1] * 30 + [2] * 8))
    assert cache.kept_slots == 38


def test_tokens_cut_off_by_a_stop_are_not_kept():
    """A stop inside an accepted block leaves fewer tokens than computed slots."""
    cache = make_cache(90)
    region = filled(cache, [1] * 30)
    del region.token_ids[20:]
    cache.release(region)
    assert cache.kept_slots == 20
    cache.check_integrity()


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.integers(0, 12))
def test_common_prefix(a: list[int], b: list[int], most: int):
    naive = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b, most) == min(naive, most)


@pytest.mark.parametrize(("source", "target"), [(0, 5), (5, 0), (0, 2), (2, 0), (3, 3)])
def test_slots_are_copied_even_where_the_ranges_overlap(source: int, target: int):
    storage = [torch.randn(9, 2, 3), torch.randn(9, 2, 3)]
    before = [t.clone() for t in storage]
    copy_slots(storage, source, target, 4)
    for now, then in zip(storage, before):
        assert torch.equal(now[target : target + 4], then[source : source + 4])
        others = [i for i in range(9) if not target <= i < target + 4]
        assert torch.equal(now[others], then[others])


def test_slot_bytes_is_what_the_arena_takes():
    cache = make_cache(8)
    assert sum(t.nbytes for t in cache.storage) == 8 * slot_bytes(CONFIG, torch.float32)
