"""How many draft tokens live decoding accepts, by domain and position: `dspark eval`.

Teacher-forced figures of training look at the target's own sampled answers; these are of real rounds, with the
drafter's own guesses in the block, so that a mask or an off-by-one that training cannot see shows here.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dspark.drafters.interface import Drafter
from dspark.drafters.load import make_drafter
from dspark.engine.rounds import MACRO_AVERAGE, acceptance_by_domain
from dspark.eval.plots import conditional_acceptance
from dspark.eval.report import acceptance_table, print_report
from dspark.eval.setting import Setting, check_plot
from dspark.sampling import SamplingParams


@dataclass(frozen=True)
class EvalConfig(Setting):
    """Which drafters to measure, on which prompts, at which temperatures; every draft token is verified."""

    drafters: tuple[str, ...] = ("dspark",)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    top_p: float = 1.0
    streams: int = 16
    plot: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        check_plot(self.plot)


def measure(config: EvalConfig) -> list[dict]:
    """One row a drafter, temperature and domain; the last of each temperature is all domains' macro average.

    Raises ValueError for a drafter that does not fit, one that drafts nothing, and prompts that cannot be used.
    """
    prompts = config.load_prompts()
    target = config.load_target()
    drafters: dict[str, Drafter] = {}
    for name in config.drafters:
        drafter = make_drafter(name, config.model, target.decoder)
        if drafter is None:
            raise ValueError("'none' drafts nothing; give dspark, mtp, ngram or a checkpoint folder")
        drafters[name] = drafter
    by_domain: dict[str, list[list[int]]] = {}
    for prompt, ids in zip(prompts, config.encode_prompts(prompts, target)):
        by_domain.setdefault(prompt.domain, []).append(ids)
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("answers", total=len(prompts) * len(config.temperatures) * len(drafters))
        for (name, drafter), temperature in product(drafters.items(), config.temperatures):
            params = SamplingParams(temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
            found = acceptance_by_domain(
                target, drafter, by_domain, params, config.streams, lambda: progress.advance(task)
            )
            rows += [{"drafter": name} | row for row in found]
    return rows


def run_and_report(config: EvalConfig, show_table: bool) -> None:
    """The whole command: decode, print the table and the JSON line, draw the plot."""
    rows = measure(config)
    print_report({"rows": rows}, show_table, acceptance_table(rows))
    if config.plot is not None:
        conditional_acceptance([row for row in rows if row["domain"] == MACRO_AVERAGE], config.plot)
