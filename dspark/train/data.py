"""Prompts and training examples on disk: JSON lines, one object a line, read with errors that name the line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypeIs


@dataclass(frozen=True)
class Prompt:
    """User turns of a conversation (the first is what a single-turn task uses) and where they come from."""

    turns: tuple[str, ...]
    domain: str = "other"
    task: str = ""


@dataclass(frozen=True)
class Example:
    """A prompt and the target's own answer to it, as token ids; only the answer is trained on."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    domain: str = "other"

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.answer_ids


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each non-empty line. Raises ValueError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"'{path}' line {number} is not a JSON object")
        yield number, row


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Prompts from lines with `turns` (list of user turns), `messages` (role/content) or `prompt` (text).

    Raises ValueError for an unreadable or empty file and for a line of another form.
    """
    prompts = []
    for number, row in read_jsonl(path):
        turns = row.get("turns")
        if turns is None and isinstance(row.get("messages"), list):
            turns = [m.get("content") for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        if turns is None and "prompt" in row:
            turns = [row["prompt"]]
        texts = [t for t in turns if isinstance(t, str) and t.strip()] if isinstance(turns, list) else []
        if not isinstance(turns, list) or not texts or len(texts) != len(turns):
            raise ValueError(f"'{path}' line {number} needs 'turns', 'messages' or 'prompt' with non-empty text")
        prompts.append(Prompt(tuple(texts), str(row.get("domain", "other")), str(row.get("task", ""))))
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts")
    return prompts


def is_token_list(value: object, vocab_size: int) -> TypeIs[list[int]]:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < vocab_size for i in value)


def read_examples(path: Path, vocab_size: int, max_length: int) -> list[Example]:
    """Examples from lines with `prompt_ids` and `answer_ids`, cut to max_length tokens.

    Lines whose answer is shorter than two tokens after the cut train nothing and are left out.
    Raises ValueError for an unreadable file, a malformed line, ids outside the vocabulary, or no example left.
    """
    examples = []
    for number, row in read_jsonl(path):
        prompt_ids, answer_ids = row.get("prompt_ids"), row.get("answer_ids")
        if not is_token_list(prompt_ids, vocab_size) or not is_token_list(answer_ids, vocab_size):
            raise ValueError(f"'{path}' line {number} needs 'prompt_ids' and 'answer_ids' below {vocab_size}")
        answer_ids = answer_ids[: max(0, max_length - len(prompt_ids))]
        if len(answer_ids) >= 2:
            examples.append(Example(tuple(prompt_ids), tuple(answer_ids), str(row.get("domain", "other"))))
    if not examples:
        raise ValueError(f"'{path}' holds no example with an answer of two tokens or more")
    return examples
