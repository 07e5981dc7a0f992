"""Prompt sets for measuring: the 30 that come with dspark, or any prompts file, evenly over the domains."""

from pathlib import Path

from dspark.train.data import Prompt, balanced, read_prompts

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")


def load_prompts(path: Path | None, limit: int | None = None) -> list[Prompt]:
    """The first of the prompts that `balanced` gives.

    Raises ValueError for an unreadable or empty file or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    return balanced(read_prompts(path or OWN_PROMPTS))[:limit]
