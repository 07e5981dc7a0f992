"""What a drafter has taken in of the committed tokens: not after each step, but when it is to draft.

Under load most steps draft for nobody. The tokens of many steps at once cost less than one by one, and those of
requests that ended meanwhile cost nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.drafters.interface import Drafter, DraftRequest
from dspark.engine.batch import Batch
from dspark.engine.kv_cache import Region
from dspark.spec.draft import Draft

MOST_BYTES = 32 << 20  # of taps that wait; more are taken in at once


@dataclass
class Waiting:
    """Committed tokens of one step, N rows: taps [N, C] a tap layer, token ids and positions [N], whose they are."""

    taps: list[Tensor]
    tokens: Tensor
    positions: Tensor
    regions: list[Region]


class DrafterContext:
    """A drafter behind its backlog, and the KV cache's companion. A region that was given up has length 0: its rows are
    dropped, and those of one that moved are written where it lies when they are taken in."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.waiting: list[Waiting] = []
        self.waiting_bytes = 0

    def add(self, batch: Batch, taps: list[Tensor], accepted: list[int]) -> None:
        """Committed tokens of a step that is over; accepted[i] belongs to batch.sampled[i]."""
        if not self.drafter.tap_layers:
            return
        kept = iter(accepted)
        rows: list[int] = []
        regions: list[Region] = []
        for span in batch.spans:
            rejected = span.verify_length - next(kept) if span.reaches_anchor else 0
            rows += range(span.first_row, span.first_row + span.count - rejected)
            regions += [span.region] * (span.count - rejected)
        index = slice(len(rows))  # of one request or where nothing was rejected; else a copy of the rows
        if rows[-1:] != [len(rows) - 1]:
            index = torch.tensor(rows, dtype=torch.int64, device=batch.tokens.device)
        waiting = Waiting([t[index] for t in taps], batch.tokens[index], batch.positions[index], regions)
        self.waiting.append(waiting)
        self.waiting_bytes += sum(t.nbytes for t in waiting.taps)
        if self.waiting_bytes > MOST_BYTES:
            self.take_in()

    @torch.inference_mode()
    def take_in(self) -> None:
        """Give the drafter all that waits."""
        parts, slots = [], []
        for w in self.waiting:
            positions = w.positions.tolist()
            alive = [i for i, region in enumerate(w.regions) if positions[i] < region.length]
            slots += [w.regions[i].start + positions[i] for i in alive]
            index = slice(None) if len(alive) == len(positions) else torch.tensor(alive, dtype=torch.int64)
            parts.append([t[index] for t in (w.tokens, w.positions, *w.taps)])
        self.waiting, self.waiting_bytes = [], 0
        if not slots:
            return
        tokens, positions, *taps = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts))
        self.drafter.extend(taps, tokens, positions, torch.tensor(slots, device=tokens.device))

    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        self.drafter.copy(source_slot, target_slot, count)

    def propose(self, requests: list[DraftRequest]) -> Draft:
        self.take_in()
        return self.drafter.propose(requests)
