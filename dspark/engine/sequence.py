"""One request and its state. Holds no tensors."""

from dataclasses import dataclass, field

from dspark.engine.answer_text import AnswerText
from dspark.engine.kv_cache import Region
from dspark.sampling import SamplingParams, TokenLogprobs


@dataclass
class Sequence:
    """Tokens so far and how many of them the target has computed.

    The last token is the anchor: its KV is not computed. A sequence decodes when the anchor is an output token and
    alone pending; before that it is in prefill. The prompt's last chunk gives the first output token. A preempted
    sequence has lost its region: its prefill computes all up to the anchor again, so that its next round drafts from
    where it would have without the preemption.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    coupled: bool = field(default=False, kw_only=True)  # see `Runner.judge`
    prompt_length: int = field(init=False)
    end_ids: frozenset[int] = frozenset()  # tokens that end the answer: the model's own unless ignored, and stop ids
    text: AnswerText | None = None  # only for a request with stop strings
    region: Region | None = None
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    stopped_by: int | str | None = None  # the end token or stop string, where finish_reason is "stop"
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the output tokens, if asked for
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
    def num_prefill(self) -> int:
        """Pending tokens to compute before it decodes."""
        return self.num_pending - (len(self.token_ids) > self.prompt_length)

    @property
    def decoding(self) -> bool:
        return self.num_prefill == 0

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

    def append(self, tokens: list[int]) -> list[int]:
        """Commit new tokens up to the first that ends the request; returns those that were kept."""
        before = len(self.token_ids)
        for token in tokens:
            self.token_ids.append(token)
            self._check_end(token)
            if self.finish_reason is not None:
                break
        return self.token_ids[before:]

    def _check_end(self, token: int) -> None:
        """Whether the answer ends with the token just appended; of several reasons a stop string comes first."""
        ends, last = token in self.end_ids, self.remaining <= 0
        if self.text is not None:
            self.text.push([token], len(self.token_ids) - self.prompt_length > self.params.min_new_tokens)
            if ends or last:
                self.text.finish()
            self.stopped_by = self.text.stopped_by
        if self.stopped_by is None and ends:
            self.stopped_by = token
        if self.stopped_by is not None:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
