"""One request and its state. Holds no tensors."""

from dataclasses import dataclass, field

from dspark.engine.kv_cache import Region
from dspark.sampling import SamplingParams


@dataclass
class Sequence:
    """Tokens so far and how many of them the target has computed.

    The last token is the anchor: its KV is not computed. So a sequence decodes when exactly one token
    is pending and is in prefill when more are.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    prompt_length: int = field(init=False)
    region: Region | None = None
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    rounds: int = 0  # decoding steps so far; the step that ends the prompt is none
    accepted_tokens: int = 0  # tokens that these rounds committed beyond the target's own

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @property
    def num_computed(self) -> int:
        return self.region.length if self.region is not None else 0

    @property
    def kv(self) -> Region:
        assert self.region is not None, "the sequence is not admitted"
        return self.region

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def decoding(self) -> bool:
        return self.num_pending == 1

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def first_slot(self) -> int:
        """Arena slot of position 0."""
        return self.kv.start

    @property
    def accepted_length(self) -> float:
        """Tokens committed a round, 1 where there was none yet."""
        return 1 + self.accepted_tokens / max(1, self.rounds)

    @property
    def remaining(self) -> int:
        """Tokens that the request may still emit."""
        return self.params.max_new_tokens - (len(self.token_ids) - self.prompt_length)

    def append(self, tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
        """Commit new tokens up to the first that ends the request; returns those that were kept."""
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            if token in stop_ids:
                self.finish_reason = "stop"
                break
            if len(self.token_ids) - self.prompt_length + len(kept) >= self.params.max_new_tokens:
                self.finish_reason = "length"
                break
        self.token_ids.extend(kept)
        return kept
