"""What a data run has to do: its configuration, and the conversations that are still to be answered."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from dspark.draws import sample_seed
from dspark.sampling import SamplingParams
from dspark.train.conversation import Conversation
from dspark.train.data import Prompt
from dspark.train.output import write_row


@dataclass(frozen=True)
class DataConfig:
    """All that a data run depends on: `prompts` or `self_written` and how they are answered.

    Sample s of a prompt uses setting (n + s) of `samplings`, round and round, n being a hash of the prompt's text.
    """

    out: Path
    prompts: Path | None = None  # JSON lines, a dataset's folder or its name on the hub
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    self_written: int = 0  # prompts that the target writes instead, kept beside `out`
    keep_answers: bool = False  # take those of the prompts file as they are: not the target's own
    model: str = "smollm2-135m"
    dtype: str = "bf16"
    device: str = "cpu"
    streams: int = 32  # answers at once, of the embedded engine or of each server
    servers: tuple[str, ...] = ()  # OpenAI-compatible ones that run the model; none: the embedded engine
    timeout: float = 600.0  # seconds for one answer of a server
    samples: int = 1
    samplings: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.2, 0.9), (0.7, 0.95), (1.0, 1.0))  # temperature, top_p
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None  # None: what fits the engine
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "streams", "timeout", "max_prompt_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if (self.prompts is None) == (self.self_written < 1):
            raise ValueError("give either prompts or a number of self-written ones, 1 or more")
        if self.self_written and (self.servers or self.keep_answers):
            raise ValueError("self-written prompts need the embedded engine; afterwards give their file as prompts")
        if self.keep_answers and (self.servers or self.samples > 1):
            raise ValueError(
                "answers are either kept or asked for: --keep-answers goes with neither --server nor --samples"
            )
        if not self.samplings:
            raise ValueError("give at least one sampling setting")
        for temperature, top_p in self.samplings:
            SamplingParams(temperature, top_p=top_p, max_new_tokens=self.max_new_tokens)


class Work:
    """The conversations that a run has still to answer, and what has become of the others."""

    def __init__(
        self,
        config: DataConfig,
        prompts: list[Prompt],
        done: set[tuple[int, int]],
        tokenizer: PreTrainedTokenizerBase,
        longest: int | None,
        progress: Progress,
    ):
        """longest: prompt tokens, history included. Raises ValueError for prompts that cannot be used."""
        given = len(prompts)
        if config.keep_answers:
            prompts = with_kept_turns(prompts)
        unique: dict[int, list[Prompt]] = {}  # more than one: other answers to the same
        for prompt in prompts:
            variants = unique.setdefault(prompt.number, [])
            if not variants or (config.keep_answers and all(v.answers != prompt.answers for v in variants)):
                variants.append(prompt)
        self.config, self.tokenizer, self.longest, self.progress = config, tokenizer, longest, progress
        if tokenizer.chat_template is None and any(len(variants[0].turns) > 1 for variants in unique.values()):
            raise ValueError(f"'{config.model}' has no chat template for prompts of several turns")
        if config.keep_answers:
            jobs = [(prompt, sample) for variants in unique.values() for sample, prompt in enumerate(variants)]
        else:
            jobs = [(variants[0], sample) for sample in range(config.samples) for variants in unique.values()]
            jobs = [(prompt, sample) for prompt, sample in jobs if not self.repeats_greedy(prompt.number, sample)]
        self.pending = [(prompt, sample) for prompt, sample in jobs if (prompt.number, sample) not in done]
        self.counts = {
            "prompts": len(unique),
            "duplicates": len(prompts) - sum(map(len, unique.values())),
            "unanswered": given - len(prompts),  # left out, where answers are kept
            "answers_before": len(jobs) - len(self.pending),
            "answers": 0,
            "tokens": 0,
            "too_long": 0,  # left out
            "cut_short": 0,  # conversations whose last turns were left out
            "refused": 0,  # by servers; tried again by the next run
        }
        self.started = time.perf_counter()
        self.task = progress.add_task("answers", total=len(jobs), completed=self.counts["answers_before"], tokens="")

    def repeats_greedy(self, number: int, sample: int) -> bool:
        return sample >= len(self.config.samplings) and self.sampling(number, sample)[0] == 0

    def sampling(self, number: int, sample: int) -> tuple[float, float]:
        return self.config.samplings[(number + sample) % len(self.config.samplings)]

    def __iter__(self) -> Iterator[Conversation]:
        """Conversations whose first turn is rendered. Raises ValueError naming the line of one that cannot be."""
        for prompt, sample in self.pending:
            temperature, top_p = self.sampling(prompt.number, sample)
            seed = sample_seed(sample_seed(self.config.seed, prompt.number), sample)
            params = SamplingParams(temperature, top_p=top_p, seed=seed, max_new_tokens=self.config.max_new_tokens)
            conversation = Conversation(prompt, None if self.config.keep_answers else params, sample)
            if self.ask(conversation):
                yield conversation
            else:
                self.left_out("too_long")

    def ask(self, conversation: Conversation) -> bool:
        """Render the next turn; whether it fits."""
        conversation.ask(self.tokenizer)
        return self.longest is None or len(conversation.asked[0]) <= self.longest

    def answer(self, conversation: Conversation, text: str, finish: str, token_ids: list[int] | None = None) -> bool:
        """Take in an answer; whether another turn was rendered after it. Otherwise the conversation is written.

        token_ids: None where the answer came as text. Raises ValueError naming the line of one that has none.
        """
        if token_ids is None:
            token_ids = conversation.encode(self.tokenizer, text, finish)
        conversation.answer(text, token_ids, finish)
        self.counts["tokens"] += len(token_ids)
        try:
            if conversation.turns_left and self.ask(conversation):
                return True
        except ValueError:  # one answer that no history can hold does not end the run
            if self.config.keep_answers:
                raise
        self.write(conversation)
        return False

    def write(self, conversation: Conversation) -> None:
        write_row(self.config.out, {**conversation.row(), "model": self.config.model})
        self.counts["answers"] += 1
        self.counts["cut_short"] += conversation.turns_left > 0
        tokens, speed = self.counts["tokens"], self.counts["tokens"] / (time.perf_counter() - self.started)
        self.progress.update(self.task, advance=1, tokens=f"{tokens} tokens, {speed:.0f}/s")

    def refused(self, conversation: Conversation) -> None:
        """A turn that no server answers: the turns before it are written."""
        if conversation.answers:
            self.write(conversation)
        else:
            self.left_out("refused")

    def left_out(self, why: str) -> None:
        self.counts[why] += 1
        self.progress.advance(self.task)

    def summary(self) -> dict:
        seconds = time.perf_counter() - self.started
        speed = round(self.counts["tokens"] / seconds, 1)
        return {**self.counts, "seconds": round(seconds, 1), "tokens_per_s": speed, "out": str(self.config.out)}


def with_kept_turns(prompts: list[Prompt]) -> list[Prompt]:
    """The turns that have answers. Raises ValueError naming the first line if none has any."""
    if prompts and not any(prompt.answers for prompt in prompts):
        raise ValueError(f"{prompts[0].place} holds no answers to keep: 'messages' of user and assistant in turns")
    return [replace(p, turns=p.turns[: len(p.answers)]) for p in prompts if p.answers]
