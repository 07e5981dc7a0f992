"""What a drafter has taken in of the committed tokens: of a request not after each step, but when it is drafted for.

Under load most steps draft for nobody, and others for few. The tokens of many steps at once cost less than one by one,
and those of requests that end before they are drafted for cost nothing.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspark.drafters.interface import Drafter
from dspark.engine.batch import Batch
from dspark.engine.kv_cache import Region
from dspark.engine.sequence import Sequence
from dspark.spec.draft import Draft

MOST_ROWS = 1024  # that a drafter is given at once
PIECE_BYTES = 8 << 20  # taken in at a time, so that no step takes much longer than others


@dataclass(eq=False)
class Step:
    """What a step left of its B rows: token ids and positions [B], then taps [B, C] a tap layer."""

    number: int  # of the step
    columns: list[Tensor]
    waiting: int  # requests whose rows were not taken in

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.columns)

    def rows(self, wanted: list[int]) -> list[Tensor]:
        """Its columns, of these rows alone, at least one; views of rows that lie in order side by side."""
        first, end = wanted[0], wanted[0] + len(wanted)
        in_order = wanted == list(range(first, end))
        index = slice(first, end) if in_order else torch.tensor(wanted, device=self.columns[0].device)
        return [column[index] for column in self.columns]


class Rows(NamedTuple):
    """Rows first .. end of a step: a request's committed tokens, from `position` on."""

    step: Step
    first: int
    end: int
    position: int


class DrafterContext:
    """A drafter behind its backlog, and the KV cache's companion. A region that was given up has length 0: its rows are
    dropped, and those of one that moved are written where it lies when they are taken in."""

    def __init__(self, drafter: Drafter, most_bytes: int):
        """most_bytes: of steps that may wait; of more the oldest are taken in."""
        self.drafter, self.most_bytes = drafter, most_bytes
        self.waiting: dict[Region, list[Rows]] = {}
        self.waiting_bytes = 0
        self._numbers = itertools.count()

    def add(self, batch: Batch, taps: list[Tensor], accepted: list[int]) -> None:
        """Committed tokens of a step that is over; accepted[i] belongs to batch.sampled[i]."""
        if not self.drafter.tap_layers:
            return
        kept = iter(accepted)
        step = Step(next(self._numbers), [batch.tokens, batch.positions, *taps], len(batch.chunks))
        for chunk, first in zip(batch.chunks, batch.first_rows):
            count = chunk.count + (next(kept) if chunk.reaches_anchor else 0)
            self.waiting.setdefault(chunk.region, []).append(Rows(step, first, first + count, chunk.position))
        self.waiting_bytes += step.num_bytes
        if self.waiting_bytes > self.most_bytes:
            self.take_in([region for region in self.waiting if not region.length])  # forgets them, no more
        if self.waiting_bytes > self.most_bytes:
            self.take_in(list(self.waiting), newest=self.oldest(self.waiting_bytes - self.most_bytes + PIECE_BYTES))

    def oldest(self, num_bytes: int) -> float:
        """Number of the step up to which so many bytes wait."""
        for step in sorted({rows.step for waits in self.waiting.values() for rows in waits}, key=lambda s: s.number):
            num_bytes -= step.num_bytes
            if num_bytes <= 0:
                return step.number
        return math.inf

    def take_in(self, regions: Iterable[Region], newest: float = math.inf) -> None:
        """Give the drafter all that waits of these from steps up to the one of that number."""
        taken = {region: [r for r in self.waiting.get(region, ()) if r.step.number <= newest] for region in regions}
        self._extend(taken)
        for region, all_rows in taken.items():
            self.waiting[region] = self.waiting.get(region, [])[len(all_rows) :]
            if not self.waiting[region]:
                del self.waiting[region]
            for rows in all_rows:
                rows.step.waiting -= 1
                if not rows.step.waiting:
                    self.waiting_bytes -= rows.step.num_bytes

    @torch.inference_mode()
    def _extend(self, taken: dict[Region, list[Rows]]) -> None:
        """By pieces of a bounded size: drafters have buffers for the largest."""
        wanted: dict[Step, list[tuple[int, int]]] = {}  # rows, and the slots they go to
        for region, all_rows in taken.items():
            for rows in all_rows:
                alive = min(rows.end - rows.first, region.length - rows.position)
                if alive > 0:
                    slot = region.start + rows.position
                    wanted.setdefault(rows.step, []).extend((rows.first + i, slot + i) for i in range(alive))
        if not wanted:
            return
        in_order = sorted(wanted, key=lambda step: step.number)  # a request's positions too are in order then
        parts = [step.rows([row for row, _ in wanted[step]]) for step in in_order]
        tokens, positions, *taps = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts))
        slots = torch.tensor([slot for step in in_order for _, slot in wanted[step]], device=tokens.device)
        columns = (tokens, positions, slots, *taps)
        pieces = [columns] if len(slots) <= MOST_ROWS else zip(*(column.split(MOST_ROWS) for column in columns))
        for tokens, positions, slots, *taps in pieces:
            self.drafter.extend(taps, tokens, positions, slots)

    def behind(self, sequences: list[Sequence]) -> int:
        """Committed tokens of these that the drafter has not taken in."""
        return sum(rows.end - rows.first for s in sequences for rows in self.waiting.get(s.kv, ()))

    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        self.drafter.copy(source_slot, target_slot, count)

    def propose(self, sequences: list[Sequence], slots: int) -> Draft:
        self.take_in(s.kv for s in sequences)
        return self.drafter.propose([*sequences], slots)
