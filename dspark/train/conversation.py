"""A conversation in token ids: the chat template, answers put into the history turn by turn, and where they stand."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

from dspark.engine.llm import apply_template, encode_prompt
from dspark.sampling import SamplingParams
from dspark.train.data import Prompt

Messages = list[dict[str, str]]
Rendered = tuple[list[int], list[tuple[int, int]]]


@dataclass
class Conversation:
    """One sample of a prompt while it is answered. `asked`: the turn to answer, as `render` gives it."""

    prompt: Prompt
    params: SamplingParams | None = None  # None: the answers were given
    sample: int = 0
    answers: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)  # "stop" or "length", for each answer
    asked: Rendered = ([], [])
    answered: Rendered = ([], [])  # the last turn that has an answer
    answer_ids: list[int] = field(default_factory=list)

    @property
    def turns_left(self) -> int:
        return len(self.prompt.turns) - len(self.answers)

    @property
    def messages(self) -> Messages:
        """All up to the turn that is to be answered next."""
        messages = [{"role": "system", "content": self.prompt.system}] if self.prompt.system else []
        for turn, answer in zip(self.prompt.turns, [*self.answers, None]):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def ask(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Render the next turn. Raises ValueError naming the prompt's line where `render` does."""
        with self.named():
            self.asked = render(tokenizer, self.messages, [finish == "stop" for finish in self.finishes])

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str, finish: str) -> list[int]:
        """Token ids of an answer that came as text. Raises ValueError naming the prompt's line."""
        with self.named():
            return encode_answer(tokenizer, text, finish)

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.prompt.place}: {error}") from None

    def answer(self, text: str, token_ids: list[int], finish: str) -> None:
        """Take in the answer to what was asked."""
        self.answered, self.answer_ids = self.asked, token_ids
        self.answers.append(text)
        self.finishes.append(finish)

    def row(self) -> dict:
        """The line that `read_examples` reads."""
        return {
            "turns": list(self.prompt.turns),
            "sample": self.sample,
            "answers": self.answers,
            "prompt_ids": self.answered[0],
            "answer_ids": self.answer_ids,
            "earlier": self.answered[1],
            "temperature": self.params and self.params.temperature,
            "top_p": self.params and self.params.top_p,
            "finish": self.finishes[-1],
            "system": self.prompt.system,
            "task": self.prompt.task,
            "domain": self.prompt.domain,
        }


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, ended: list[bool]) -> Rendered:
    """Token ids up to where the next answer begins, and [start, end) of the earlier answers among them.

    ended: for each of these whether its end token counts as part of it; that of an answer cut short does not.
    Each span is decoded back to its answer. Raises ValueError if one does not hold the answer and nothing else.
    """
    if tokenizer.chat_template is None and len(messages) == 1:
        return encode_prompt(tokenizer, messages[0]["content"]), []
    given = [m["content"] for m in messages if m["role"] == "assistant"]
    for answers in (given, [as_history(answer) for answer in given]):
        text = apply_template(tokenizer, with_answers(messages, answers))
        mark = "ANSWER-HERE"
        while any(mark in m["content"] for m in messages):
            mark = f"{mark}-{len(mark)}"
        around = apply_template(tokenizer, with_answers(messages, [mark] * len(given))).split(mark)
        expected, places = around[0], []
        for answer, after in zip(answers, around[1:]):
            places.append((len(expected), len(expected) + len(answer)))
            expected += answer + after
        if text != expected:
            continue  # the template changes what an answer says
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ids: list[int] = encoded["input_ids"]  # pyright: ignore
        starts, ends = zip(*encoded["offset_mapping"])  # pyright: ignore
        spans = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in places]
        if all(same_text(tokenizer, token_ids[slice(*span)], answer) for span, answer in zip(spans, answers)):
            closed = [end < len(token_ids) and token_ids[end] == tokenizer.eos_token_id for _, end in spans]
            return token_ids, [(s, e + (has_end and stopped)) for (s, e), has_end, stopped in zip(spans, closed, ended)]
    raise ValueError("the chat template and the tokenizer do not keep the answers as they are")


def as_history(answer: str) -> str:
    """An answer as many templates show it to later turns: without its reasoning and outer white space."""
    return answer.rpartition("</think>")[2].strip()


def with_answers(messages: Messages, answers: list[str]) -> Messages:
    replies = iter(answers)
    return [{**m, "content": next(replies)} if m["role"] == "assistant" else m for m in messages]


def same_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str) -> bool:
    """Whether the tokens spell the text, but for the Unicode normal form that some tokenizers change."""
    found = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return normalize("NFC", str(found)) == normalize("NFC", text)


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, finish: str) -> list[int]:
    """Token ids of an answer that came as text, with the end token if it ended by itself.

    Raises ValueError if they do not decode to the text, or the tokenizer names no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end token, which answers that came as text need")
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore
    if not same_text(tokenizer, token_ids, text):
        raise ValueError("the tokenizer does not keep the answer as it is")
    return token_ids + [tokenizer.eos_token_id] if finish == "stop" else token_ids  # pyright: ignore
