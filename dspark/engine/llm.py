"""The offline API: text in, text out, many prompts at once.

llm = LLM("smollm2-135m", drafter="dspark")
for answer in llm.generate(["What is the capital of France?"], SamplingParams(max_new_tokens=64)):
    print(answer.text)
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dspark.config import is_unicode
from dspark.draws import sample_seed
from dspark.engine.answer_text import AnswerText
from dspark.engine.engine import EngineConfig
from dspark.engine.policy import drafting
from dspark.engine.sequence import Sequence
from dspark.models.loader import load_target
from dspark.sampling import SamplingParams, TokenLogprobs

Prompt = str | list[int] | list[dict[str, str]]


@dataclass
class Completion:
    """One answer. `accepted_length` is tau: tokens committed a decoding round, the target's own included."""

    text: str  # ends before the stop string, if one stopped it
    token_ids: list[int]  # all tokens, those of the stop string too
    finish_reason: str  # "stop", "length" or "cancelled"
    accepted_length: float
    stopped_by: int | str | None = None  # the end token or stop string, where finish_reason is "stop"
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if asked for


class LLM:
    """A target, a drafter and an engine.

    drafter: `dspark` or `mtp` (shipped for the model), `ngram`, `none` or a checkpoint folder.
    policy: how many draft tokens are verified, see `engine/policy.py`; None: what suits the drafter.
    dtype: `bf16` or `fp32`. deterministic: the same answer to the last bit alone and in any batch, with and without
    a drafter. online_calibration: the drafter's confidence is corrected while serving, from what is verified.
    profile: a file of `dspark profile --out` to decide by, in place of the one kept for this machine.
    Raises ValueError for whatever cannot be loaded or does not fit.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        drafter: str = "dspark",
        *,
        policy: str | None = None,
        dtype: str = "bf16",
        device: str = "cpu",
        deterministic: bool = False,
        online_calibration: bool = False,
        profile: Path | None = None,
        config: EngineConfig = EngineConfig(),
    ):
        self.target = load_target(model, dtype, device, deterministic)
        self.tokenizer = self.target.tokenizer
        parts = drafting(self.target, drafter, policy, online_calibration, profile)
        self.policy = parts.policy
        self.engine = parts.engine(self.target, config)

    def generate(
        self,
        prompts: Many[Prompt],
        params: SamplingParams | Many[SamplingParams] = SamplingParams(),
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts, n of them for each; on_finish(index, completion) as each one ends.

        A prompt is a text (one user message), a list of chat messages, or token ids taken as they are.
        Without a seed a request gets a random one. Raises ValueError, before any work, for a prompt that cannot fit.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts: put the text in brackets, or use stream")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        sequences: list[Sequence] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                sequences += [self.submit(prompt, one) for one in samples(p)]
            running = dict(enumerate(sequences))
            while running:
                self.engine.step()  # requests of other callers go on too, and `on_finish` may step the engine itself
                for i in [i for i, s in running.items() if s.finish_reason is not None]:
                    sequence = running.pop(i)
                    if on_finish is not None:
                        on_finish(i, self.completion(sequence))
        finally:
            for sequence in sequences:
                self.engine.cancel(sequence)
        return [self.completion(s) for s in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[str]:
        """Pieces of the answer's text as they are committed; closing the iterator cancels the request."""
        yield from self.follow(self.submit(prompt, params))

    def submit(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Sequence:
        """Queue a request; `follow` runs it. Raises ValueError if it cannot fit."""
        return self.engine.add(self.encode(prompt), params, self.decode)

    def follow(self, sequence: Sequence) -> Iterator[str]:
        """Step the engine until the request ends, yielding its text as it grows: what is certain of it, without an
        unfinished character and what may be the beginning of a stop string."""
        text, read, sent = sequence.text or AnswerText(self.decode), 0, 0  # tokens, characters
        try:
            ended = False
            while not ended:
                ended = sequence.finish_reason is not None  # asked before the rest is read: another caller may step too
                if sequence.text is None:
                    text.push(sequence.output_ids[read:])
                    read = len(sequence.output_ids)
                certain = text.finish() if ended else text.certain
                if len(certain) > sent:
                    yield certain[sent:]
                    sent = len(certain)
                if not ended:
                    self.engine.step()
        finally:
            self.engine.cancel(sequence)

    def encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def completion(self, sequence: Sequence) -> Completion:
        """What has become of a request that has ended."""
        return Completion(
            self.decode(sequence.output_ids) if sequence.text is None else sequence.text.finish(),
            sequence.output_ids,
            sequence.finish_reason or "cancelled",
            sequence.accepted_length,
            sequence.stopped_by,
            sequence.logprobs,
        )


def samples(params: SamplingParams) -> list[SamplingParams]:
    """One request for each of the n answers; the first has the seed itself, so that n does not change it."""
    if params.n == 1:
        return [params]
    seeds = [None if params.seed is None else sample_seed(params.seed, i) for i in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; texts and messages go through the model's chat template where it has one.

    Raises ValueError for a text that is empty or no valid Unicode, for messages that the template cannot hold, and for
    what is no prompt.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if tokenizer.chat_template is None:
            check_unicode(prompt)
            return tokenizer(prompt)["input_ids"]  # pyright: ignore
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Many):
        raise ValueError(f"a prompt is a text, a list of messages or a list of token ids, not {prompt!r}")
    if prompt and isinstance(prompt[0], int):
        return list(prompt)  # pyright: ignore
    text = apply_template(tokenizer, prompt)  # pyright: ignore
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The conversation up to where the next answer begins. Raises ValueError if the template cannot hold it."""
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template: it takes a text, but no conversation and no system prompt")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("each message needs a 'role' and a 'content' that is a text")
        check_unicode(message["content"])
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"the model's chat template cannot hold this conversation: {error}") from None


def check_unicode(text: str) -> None:
    """Raise ValueError for a text that no tokenizer takes."""
    if not is_unicode(text):
        raise ValueError("the text is no valid Unicode")
