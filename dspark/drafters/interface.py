"""What the engine asks of a drafter.

Shapes: R requests, N committed tokens, G slots, C target width.
"""

from typing import Protocol

from torch import Tensor

from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft


class DraftRequest(Protocol):
    """The part of a sequence that drafters read: its last token is the anchor, all before it are committed."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def coupled(self) -> bool:
        """Whether the target's token at each position is fixed by its own draw: a draft should use the same one."""
        ...

    @property
    def first_slot(self) -> int:
        """Slot of position 0 in per-token storage; position i lives at first_slot + i."""
        ...


class Drafter(Protocol):
    """Guesses up to `block_size` tokens after each anchor. A bad guess costs time, never correctness."""

    @property
    def block_size(self) -> int: ...
    @property
    def has_confidence(self) -> bool:
        """Whether its drafts say how sure they are; else their confidence logits mean nothing."""
        ...

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Target layers whose outputs `extend` gets; empty if the drafter reads tokens only."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Bytes of storage that one token takes."""
        ...

    def allocate(self, num_slots: int) -> None:
        """Make per-token storage for the engine's arena of `num_slots` tokens; called once before all else.

        A shallow copy of a drafter, which shares its weights, must get storage of its own: one for each engine.
        """
        ...

    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Take in committed tokens: one [N, C] a tap layer; token ids, positions and slots [N] int64.

        A request's positions come in order. Slots may be written again after it ends or is recomputed; the last
        write counts.
        """
        ...

    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        """Copy what is stored for `count` slots to slots that may overlap them; the tokens' positions stay the same."""
        ...

    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        """Draft blocks of 1..block_size slots for R >= 1 requests whose tokens before the anchor were all taken in by
        `extend`.

        May write storage at the anchor and the block_size positions after it, nowhere else.
        """
        ...
