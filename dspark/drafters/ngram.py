"""Prompt lookup: propose what followed the last occurrence of the sequence's own last tokens."""

import torch
from torch import Tensor

from dspark.drafters.interface import DraftRequest
from dspark.spec.draft import Draft


class NgramDrafter:
    """Tries suffixes of max_ngram .. min_ngram tokens; the longest that occurred before wins, the latest of those."""

    tap_layers: tuple[int, ...] = ()
    slot_bytes = 0
    has_confidence = False

    def __init__(self, block_size: int = 5, max_ngram: int = 4, min_ngram: int = 2):
        if block_size < 1 or not 1 <= min_ngram <= max_ngram:
            raise ValueError("n-gram drafting needs block_size >= 1 and 1 <= min_ngram <= max_ngram")
        self.block_size, self.max_ngram, self.min_ngram = block_size, max_ngram, min_ngram

    def allocate(self, num_slots: int) -> None:
        pass

    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        pass

    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        pass

    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        found = [self.lookup(r.token_ids)[:slots] for r in requests]
        lengths = torch.tensor([len(f) for f in found])
        tokens = torch.tensor([f + [0] * (slots - len(f)) for f in found])
        return Draft.unsampled(tokens, lengths, torch.zeros(*tokens.shape, 1))

    def lookup(self, token_ids: list[int]) -> list[int]:
        """The tokens that followed the match, block_size of them, from the match on again where they come to the end of
        the sequence; empty without a match."""
        for n in range(min(self.max_ngram, len(token_ids) - 1), self.min_ngram - 1, -1):
            suffix = token_ids[-n:]
            for start in range(len(token_ids) - n - 1, -1, -1):
                if token_ids[start] == suffix[0] and token_ids[start : start + n] == suffix:
                    following = token_ids[start + n :][: self.block_size]
                    return [following[i % len(following)] for i in range(self.block_size)]
        return []
