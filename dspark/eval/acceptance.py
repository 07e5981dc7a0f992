"""How many draft tokens live decoding accepts, by domain and position: `dspark eval`.

Teacher-forced figures of training look at the target's own sampled answers; these are of real rounds, with the
drafter's own guesses in the block, so that a mask or an off-by-one that training cannot see shows here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dspark.drafters.load import make_drafter
from dspark.engine.llm import encode_prompt
from dspark.engine.rounds import acceptance_by_domain
from dspark.eval.machine import provenance
from dspark.eval.tasks import load_prompts
from dspark.models.loader import load_target


@dataclass(frozen=True)
class EvalConfig:
    """Which drafter to measure, on which prompts, at which temperatures; every draft token is verified."""

    model: str = "smollm2-135m"
    drafter: str = "dspark"
    dtype: str = "bf16"
    device: str = "cpu"
    prompts: Path | None = None
    limit: int | None = None
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 128
    streams: int = 16

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError("--temperatures must be numbers of at least 0")


def measure(config: EvalConfig) -> list[dict]:
    """One row a temperature and domain, then one a temperature for all domains: their macro average.

    Raises ValueError for a drafter that does not fit, one that drafts nothing, and prompts that cannot be used.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    prompts = load_prompts(config.prompts, config.limit)
    target = load_target(config.model, config.dtype, config.device)
    drafter = make_drafter(config.drafter, config.model, target.decoder)
    if drafter is None:
        raise ValueError("'none' drafts nothing; give dspark, ngram or a checkpoint folder")
    by_domain: dict[str, list[list[int]]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(encode_prompt(target.tokenizer, prompt.turns[0]))
    rows = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("answers", total=len(prompts) * len(config.temperatures))
        for temperature in config.temperatures:
            rows += acceptance_by_domain(
                target,
                drafter,
                by_domain,
                temperature,
                config.max_new_tokens,
                config.streams,
                lambda: progress.advance(task),
            )
    return rows


def run_and_report(config: EvalConfig, show_table: bool) -> None:
    """The whole command: decode, print the table and the JSON line."""
    from rich.console import Console

    from dspark.eval.report import acceptance_table

    rows = measure(config)
    if show_table:
        Console().print(acceptance_table(rows))
    print(json.dumps({"rows": rows, **provenance()}))
