"""Prompts and training examples: JSON lines or a Hugging Face dataset, read with errors that name the line."""

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from typing_extensions import TypeIs

from dspark.config import is_unicode
from dspark.models.source import errors_as

ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # ShareGPT's names, and OpenAI's latest


@dataclass(frozen=True)
class Prompt:
    """User turns of a conversation (the first is what a single-turn task uses) and where they come from.

    answers: what the source holds as answers to the first of them. place: names the line in errors.
    """

    turns: tuple[str, ...]
    domain: str = "other"
    task: str = ""
    system: str = ""
    answers: tuple[str, ...] = field(default=(), compare=False)
    place: str = field(default="", compare=False)

    @property
    def opening(self) -> str | list[dict[str, str]]:
        """The first turn, as `encode_prompt` takes it: with the system prompt where there is one."""
        user = {"role": "user", "content": self.turns[0]}
        return [{"role": "system", "content": self.system}, user] if self.system else self.turns[0]

    @property
    def number(self) -> int:
        """60 bits that depend on the texts alone, wherever they stand."""
        texts = json.dumps([self.system, *self.turns])
        return int(hashlib.sha256(texts.encode()).hexdigest()[:15], 16)


@dataclass(frozen=True)
class Example:
    """A conversation as token ids; only the answers in it are trained on.

    packed: the ids, four bytes each, as a run may hold a hundred million. answer_spans: [start, end) of every answer,
    in order, which the loss mask covers. opening_length: tokens before the first answer, be that trained on or not.
    """

    packed: bytes
    answer_spans: tuple[tuple[int, int], ...]
    opening_length: int
    domain: str

    @classmethod
    def of(cls, token_ids: list[int], spans: Iterable[Iterable[int]], opening_length: int, domain: str) -> "Example":
        answer_spans = tuple((start, end) for start, end in spans)
        return cls(array("i", token_ids).tobytes(), answer_spans, opening_length, domain)

    def __len__(self) -> int:
        return len(self.packed) // array("i").itemsize

    @property
    def token_ids(self) -> list[int]:
        return memoryview(self.packed).cast("i").tolist()

    @property
    def opening(self) -> tuple[int, ...]:
        """What makes examples those of one prompt."""
        return tuple(memoryview(self.packed).cast("i")[: self.opening_length])

    @property
    def answer_tokens(self) -> list[int]:
        """The tokens of all answers."""
        token_ids = self.token_ids
        return [i for start, end in self.answer_spans for i in token_ids[start:end]]


Item = TypeVar("Item", Prompt, Example)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of each non-empty line, read as they are needed. Raises ValueError naming file and line."""
    try:
        with path.open("rb") as file:  # text would also end lines at other characters, such as those inside a string
            yield from parse_lines(file, path)
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error}") from None


def parse_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict]]:
    """See `read_jsonl`."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"'{path}' line {number}"
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # besides wrong JSON, numbers and nesting without end
            raise ValueError(f"{place} is not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object")
        yield place, row


def read_prompts(path: Path, limit: int | None = None, subset: str | None = None, split: str = "train") -> list[Prompt]:
    """Prompts from JSON lines, or from a Hugging Face dataset where `path` is a folder or a hub name (owner/name).

    A row holds `turns` (list of user turns), `messages` (role/content), `conversations` (from/value) or `prompt`.
    Conversations that a chat template cannot be asked to continue, and rows of another form in a dataset, are left out
    and counted on stderr. Raises ValueError for what cannot be read or is empty and for a line of another form.
    """
    prompts, left_out, reason = [], 0, ""
    from_dataset = is_dataset(path)
    for place, row in dataset_rows(path, subset, split) if from_dataset else read_jsonl(path):
        try:
            prompts.append(parse_prompt(row, place))
        except ValueError as error:
            if not (from_dataset or isinstance(error, UnusableConversation)):
                raise
            left_out, reason = left_out + 1, reason or str(error)
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts" + (f": {reason}" if reason else ""))
    if left_out:
        print(f"left out {left_out} of {left_out + len(prompts)} rows, the first: {reason}", file=sys.stderr)
    return prompts


class UnusableConversation(ValueError):
    """Well-formed, but not of a system prompt, questions and answers alone."""


def is_dataset(path: Path) -> bool:
    """A folder, or what can only be a name on the hub."""
    of_a_hub = len(path.parts) == 2 and not path.is_absolute() and path.suffix not in (".json", ".jsonl")
    return path.is_dir() or (of_a_hub and not path.parent.exists())


def dataset_rows(path: Path, subset: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of a dataset, read as they are needed. Raises ValueError if `datasets` is missing or cannot read it."""
    name = path.as_posix()
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"cannot read the dataset '{name}': pip install datasets first") from None
    here = "" if path.exists() else ": there is no such file or folder here, and as a dataset of the hub"
    with errors_as(f"cannot read the dataset '{name}'{here}"):
        for number, row in enumerate(load_dataset(name, subset, split=split, streaming=True), 1):
            yield f"'{name}' row {number}", row


def parse_prompt(row: dict, place: str) -> Prompt:
    """One row as a prompt. Raises ValueError naming `place` for a row of another form."""
    turns, system, answers = row.get("turns"), row.get("system"), ()
    messages = row.get("messages") or row.get("conversations")
    if turns is None and isinstance(messages, list):
        rows = [m if isinstance(m, dict) else {} for m in messages]
        pairs = [(str(m.get("role") or m.get("from") or ""), m.get("content") or m.get("value")) for m in rows]
        pairs = [(ROLES.get(role, role), text) for role, text in pairs]
        system = pairs.pop(0)[1] if pairs and pairs[0][0] == "system" else system
        if other := next((role for role, _ in pairs if role not in ("user", "assistant", "")), None):
            raise UnusableConversation(f"{place}: a message of role '{other}' among questions and answers")
        if pairs and pairs[0][0] == "assistant":
            raise UnusableConversation(f"{place}: the conversation does not begin with a question")
        turns = [text for role, text in pairs if role == "user"]
        for (asker, _), (answerer, text) in zip(pairs[::2], pairs[1::2]):
            if (asker, answerer) != ("user", "assistant") or not is_text(text):
                break
            answers = (*answers, text)
        if (rest := pairs[2 * len(answers) :]) and rest[0][0] != "user":
            answers = ()
    if turns is None and "prompt" in row:
        turns = [row["prompt"]]
    texts = [text for text in turns if is_text(text)] if isinstance(turns, list) else []
    if not isinstance(turns, list) or not texts or len(texts) != len(turns):
        raise ValueError(f"{place} needs 'turns', 'messages', 'conversations' or 'prompt' with non-empty text")
    domain, task = str(row.get("domain") or "other"), str(row.get("task") or "")
    if not is_unicode(domain + task):
        raise ValueError(f"{place}: 'domain' or 'task' is no valid Unicode")
    return Prompt(tuple(texts), domain, task, system if is_text(system) else "", answers, place)


def is_text(value: object) -> TypeIs[str]:
    """Not blank, and valid Unicode."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def is_token_list(value: object, vocab_size: int) -> TypeIs[list[int]]:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < vocab_size for i in value)


def read_examples(path: Path, vocab_size: int, max_length: int) -> list[Example]:
    """Examples from lines with `prompt_ids`, `answer_ids` and perhaps `earlier`, cut to max_length tokens.

    Answers shorter than two tokens after the cut train nothing and are left out of the mask, lines of only such are
    left out altogether. Raises ValueError for an unreadable file, a malformed line, ids outside the vocabulary, or no
    example left.
    """
    examples = []
    for place, row in read_jsonl(path):
        prompt_ids, answer_ids, earlier = row.get("prompt_ids"), row.get("answer_ids"), row.get("earlier", [])
        if not is_token_list(prompt_ids, vocab_size) or not is_token_list(answer_ids, vocab_size):
            raise ValueError(f"{place} needs 'prompt_ids' and 'answer_ids' below {vocab_size}")
        if not are_spans(earlier, len(prompt_ids)):
            raise ValueError(f"{place}: 'earlier' must hold the [start, end) of answers in 'prompt_ids', in order")
        token_ids = prompt_ids + answer_ids
        spans = [*earlier, (len(prompt_ids), len(token_ids))]
        opening = spans[0][0]
        spans = [(start, min(end, max_length)) for start, end in spans if min(end, max_length) - start >= 2]
        if spans:
            examples.append(Example.of(token_ids[: spans[-1][1]], spans, opening, str(row.get("domain") or "other")))
    if not examples:
        raise ValueError(f"'{path}' holds no example with an answer of two tokens or more")
    return examples


def are_spans(value: object, length: int) -> TypeIs[list[list[int]]]:
    if not isinstance(value, list) or not all(is_token_list(s, length + 1) and len(s) == 2 for s in value):
        return False
    bounds = [bound for span in value for bound in span]
    return bounds == sorted(bounds)


def split_by_prompt(files: list[list[Example]], count: int) -> tuple[list[Example], list[list[Example]]]:
    """(held out, the others by file): the fewest prompts with `count` examples or more, those of the smallest hash.

    A prompt is on one side with all its answers, and one that was trained on stays there when data is added.
    """
    sizes = Counter(e.opening for examples in files for e in examples)
    chosen, held = set(), 0
    for prompt in sorted(sizes, key=lambda prompt: hashlib.sha256(str(prompt).encode()).digest()):
        if held >= count:
            break
        chosen.add(prompt)
        held += sizes[prompt]
    heldout = [e for examples in files for e in examples if e.opening in chosen]
    return heldout, [[e for e in examples if e.opening not in chosen] for examples in files]


def balanced(items: Iterable[Item]) -> list[Item]:
    """Taken round and round from the domains, so that the first N are balanced for every N."""
    by_domain: dict[str, list[Item]] = {}
    for item in items:
        by_domain.setdefault(item.domain, []).append(item)
    rounds = zip_longest(*(of_domain for _, of_domain in sorted(by_domain.items())))
    return [item for in_turn in rounds for item in in_turn if item is not None]


def mix(files: list[list[Example]], weights: tuple[float, ...]) -> list[Example]:
    """Examples of an epoch in which the files have shares as their weights: each once, those short of it repeated."""
    total = max(len(examples) / weight for examples, weight in zip(files, weights, strict=True))
    return [
        examples[i % len(examples)]
        for examples, weight in zip(files, weights)
        if examples
        for i in range(round(total * weight))
    ]
