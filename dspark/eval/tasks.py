"""Prompt sets for measuring: the 30 that come with dspark, or any prompts file, evenly over the domains."""

from pathlib import Path

from dspark.train.data import Prompt, read_prompts

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")


def load_prompts(path: Path | None, limit: int | None = None) -> list[Prompt]:
    """Prompts taken round and round from the domains, so that the first N are balanced for every N.

    Raises ValueError for an unreadable or empty file or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(path or OWN_PROMPTS):
        by_domain.setdefault(prompt.domain, []).append(prompt)
    queues = [list(reversed(prompts)) for _, prompts in sorted(by_domain.items())]
    balanced = []
    while any(queues):
        balanced += [queue.pop() for queue in queues if queue]
    return balanced[:limit]
