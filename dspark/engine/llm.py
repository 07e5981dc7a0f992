"""The offline API: text in, text out, many prompts at once.

llm = LLM("smollm2-135m", drafter="dspark")
for answer in llm.generate(["What is the capital of France?"], SamplingParams(max_new_tokens=64)):
    print(answer.text)
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dspark.drafters.load import make_drafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.sequence import Sequence
from dspark.models.loader import load_target
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength

Prompt = str | list[int] | list[dict[str, str]]


@dataclass
class Completion:
    """One answer. `accepted_length` is tau: tokens committed a decoding round, the target's own included."""

    text: str
    token_ids: list[int]
    finish_reason: str
    accepted_length: float


class TextStream:
    """Turns growing token lists into text deltas; holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.sent = tokenizer, ""

    def delta(self, token_ids: list[int], finished: bool) -> str:
        """The text that is new since the last call; token_ids are all of the answer so far."""
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        if text.endswith("\ufffd") and not finished:
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


class LLM:
    """A target, a drafter and an engine.

    drafter: `dspark` (shipped for the model), `ngram`, `none` or a checkpoint folder.
    verify_length: draft tokens verified a round; None: all of the block. dtype: `bf16` or `fp32`.
    Raises ValueError for whatever cannot be loaded or does not fit.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        drafter: str = "dspark",
        *,
        verify_length: int | None = None,
        dtype: str = "bf16",
        device: str = "cpu",
        config: EngineConfig = EngineConfig(),
    ):
        self.target = load_target(model, dtype, device)
        self.tokenizer = self.target.tokenizer
        self.engine = Engine(
            self.target.decoder,
            make_drafter(drafter, model, self.target.decoder),
            None if verify_length is None else FixedLength(verify_length),
            eos_ids=self.target.eos_ids,
            config=config,
        )

    def generate(
        self,
        prompts: Many[Prompt],
        params: SamplingParams | Many[SamplingParams] = SamplingParams(),
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts; on_finish(index, completion) as each one ends.

        A prompt is a text (one user message), a list of chat messages, or token ids taken as they are.
        Without a seed a request gets a random one. Raises ValueError, before any work, for a prompt that cannot fit.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        sequences: list[Sequence] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                sequences.append(self.engine.add(self.encode(prompt), p))
            index = {s.request_id: i for i, s in enumerate(sequences)}
            while any(s.finish_reason is None for s in sequences):
                for new in self.engine.step():
                    if new.sequence.finish_reason is not None and on_finish is not None:
                        on_finish(index[new.sequence.request_id], self.completion(new.sequence))
        finally:
            for sequence in sequences:
                self.engine.cancel(sequence)
        return [self.completion(s) for s in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[str]:
        """Pieces of the answer's text as they are committed; closing the iterator cancels the request."""
        yield from self.follow(self.submit(prompt, params))

    def submit(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Sequence:
        """Queue a request; `follow` runs it. Raises ValueError if it cannot fit."""
        return self.engine.add(self.encode(prompt), params)

    def follow(self, sequence: Sequence) -> Iterator[str]:
        """Step the engine until the request ends, yielding its text as it grows."""
        text = TextStream(self.tokenizer)
        try:
            while sequence.finish_reason is None:
                self.engine.step()
                if delta := text.delta(sequence.output_ids, sequence.finish_reason is not None):
                    yield delta
        finally:
            self.engine.cancel(sequence)

    def encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt)

    def completion(self, sequence: Sequence) -> Completion:
        text = str(self.tokenizer.decode(sequence.output_ids, skip_special_tokens=True))
        return Completion(text, sequence.output_ids, sequence.finish_reason or "cancelled", sequence.accepted_length)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; texts and messages go through the model's chat template where it has one.

    Raises ValueError for an empty text.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if tokenizer.chat_template is None:
            return tokenizer(prompt)["input_ids"]  # pyright: ignore
        prompt = [{"role": "user", "content": prompt}]
    if prompt and isinstance(prompt[0], int):
        return list(prompt)  # pyright: ignore
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]  # pyright: ignore
