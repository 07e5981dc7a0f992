"""`dspark bench load`: one model under rising load, several ways to choose verify lengths, in one interleaved run.

Every policy has a lane of its own, an engine that is fed with the same prompts in the same order. Closed loop: so many
requests are always in flight; slices of all policies take turns, and a lane goes on where its last slice ended. The
first slice of a pass takes its time, the others until their lanes have given out as many tokens: so all policies serve
nearly the same part of the same answers. Open loop: requests arrive at random (Poisson); every policy gets the same
arrivals, from an empty engine until the last answer. Idle time is counted but not waited for.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from dspark.drafters.interface import Drafter
from dspark.drafters.load import make_drafter
from dspark.engine.engine import EngineConfig
from dspark.engine.policy import BY_COST, Drafting, check_policy, make_calibrator, make_policy
from dspark.engine.profile import cost_table
from dspark.eval.load_lane import Lane, poisson_arrivals
from dspark.eval.load_stats import Tally, largest_error, summarise
from dspark.eval.plots import load_plots
from dspark.eval.report import load_table, print_report, summary_table
from dspark.eval.setting import Setting
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import FixedLength

KV_GIB = 8.0  # of all lanes together, where they need so much
MIN_STEPS = 8  # of the first slice of a pass, however long they take
MOST_TIMES = 10  # --seconds that policies get at a load at most while ratios are not precise enough
TRACE_SECONDS = 10.0  # of arrivals in the open loop, before it drains


@dataclass(frozen=True)
class LoadConfig(Setting):
    """What to run, under which loads, for how long. No policies: plain, every fixed length, and all scheduled ones."""

    drafter: str = "dspark"
    policies: tuple[str, ...] = ()
    arrivals: Literal["closed", "poisson", "both"] = "closed"
    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # requests a second, for Poisson arrivals
    seconds: float = 20.0  # of a policy at each load, on average
    slice_seconds: float = 1.0  # of the first policy of a pass
    precision: float = 0.0  # go on in the closed loop until no ratio's standard error is larger; 0: do not
    temperature: float = 0.0
    seed: int = 0
    profile: Path | None = None  # costs to decide by, in place of those kept
    online_calibration: bool = False  # each policy with one of its own, as a server would have it
    plots: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for policy in self.policies:
            if policy != "plain":
                check_policy(policy)
        if not self.rates or not all(value > 0 for value in (*self.rates, self.seconds, self.slice_seconds)):
            raise ValueError("--rates, --seconds and --slice must be above 0")

    @property
    def traces(self) -> int:
        """How many traces of arrivals the open loop replays to each policy."""
        return max(1, round(self.seconds / TRACE_SECONDS))

    @property
    def loads(self) -> list[tuple[str, float]]:
        """(arrivals, number of streams or rate), in the order they are run."""
        every = [*(("closed", n) for n in self.streams), *(("poisson", r) for r in self.rates)]
        return [load for load in dict.fromkeys(every) if self.arrivals in (load[0], "both")]


class LoadBench:
    """A lane for each policy of a run, and what has been measured so far: tallies[arrivals, load][policy]."""

    def __init__(self, config: LoadConfig, target: Target, drafter: Drafter | None):
        """Raises ValueError for policies that the drafter cannot serve and prompts that do not fit."""
        block_size = drafter.block_size if drafter is not None else 0
        names = tuple(dict.fromkeys(config.policies)) or default_policies(block_size)
        self.costs: CostTable | None = None

        def get_costs() -> CostTable:
            self.costs = self.costs or cost_table(target, drafter, config.drafter, config.profile)
            return self.costs

        def drafting(policy: str) -> Drafting:
            if policy == "plain" or drafter is None:
                return Drafting(None, FixedLength(0), None, policy)
            calibrator = make_calibrator(drafter, config.drafter, target.source.name, config.online_calibration)
            own = copy.copy(drafter)  # of the same weights; its engine makes it storage of its own
            return Drafting(own, make_policy(policy, block_size, get_costs), calibrator, policy)

        speculative = [name for name in names if name != "plain"]
        if speculative and drafter is None:
            raise ValueError(f"policy '{speculative[0]}' needs a drafter; give one, or --policies plain")
        self.config, self.names = config, names
        prompts = config.encode_prompts(config.load_prompts(), target)
        params = SamplingParams(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
        longest = max(map(len, prompts)) + config.max_new_tokens
        # No memory of prompts: they come again and again, which users' would not.
        limits = EngineConfig(max(config.streams), longest, KV_GIB / len(names), reuse_prefixes=False, seed=0)
        # They live through all loads, as in a server: what they learn of the drafter does not depend on the load.
        self.lanes: dict[str, Lane] = {}
        for name in names:
            engine = drafting(name).engine(target, limits)
            if longest > (most := engine.longest_request):
                raise ValueError(f"the longest prompt and answer have {longest} tokens, more than the limit of {most}")
            self.lanes[name] = Lane(engine, prompts, params)
        self.tallies: dict[tuple[str, float], dict[str, Tally]] = {}

    def run(self, on_slice: Callable[[str, float], None] = lambda *_: None) -> None:
        """Measure everything; on_slice(text, seconds that count) after each slice. What is booked survives Ctrl-C."""
        for arrivals, load in self.config.loads:
            tallies = self.tallies[arrivals, load] = {name: Tally() for name in self.names}
            if arrivals == "closed":
                self.closed_loop(int(load), tallies, on_slice)
            else:
                self.open_loop(load, tallies, on_slice)

    @property
    def planned_seconds(self) -> float:
        return len(self.config.loads) * len(self.names) * self.config.seconds

    def closed_loop(self, streams: int, tallies: dict[str, Tally], on_slice: Callable[[str, float], None]) -> None:
        for lane in self.lanes.values():
            self.warm_up(lane, streams)
        order, shuffle = list(self.names), random.Random(self.config.seed).shuffle
        while self.goes_on(tallies):
            shuffle(order)
            goal = None
            for name in order:
                seconds = self.run_slice(self.lanes[name], tallies[name], streams, goal)
                goal = goal or self.lanes[name].tokens
                on_slice(f"{streams} streams, slice {len(tallies[name].slices)}, {name}", seconds)

    def goes_on(self, tallies: dict[str, Tally]) -> bool:
        """Until the policies had their time and, if ratios are to be precise, are so or never will be."""
        seconds = sum(tally.seconds for tally in tallies.values()) / len(tallies)
        imprecise = 0 < self.config.precision < largest_error(tallies)
        return seconds < self.config.seconds * (MOST_TIMES if imprecise else 1)

    def warm_up(self, lane: Lane, streams: int) -> None:
        """Until half of the first requests, cut to random lengths, have made room: positions are mixed by then."""
        lane.restart(self.config.seed)
        for _ in range(streams):
            lane.submit(0.0, lane.random.randint(1, self.config.max_new_tokens))
        while lane.finished < (streams + 1) // 2 or lane.tokens < MIN_STEPS * streams:
            lane.step(Tally([[0, 0.0]]), streams)

    def run_slice(self, lane: Lane, tally: Tally, streams: int, goal: int | None) -> float:
        """One turn of a policy, until its lane has given out `goal` tokens, None: for its time. Returns its seconds."""
        tally.slices.append([0, 0.0])
        steps, seconds = 0, 0.0

        def over() -> bool:
            if goal is not None:
                return lane.tokens >= goal
            return seconds >= self.config.slice_seconds and steps >= MIN_STEPS

        while not over():
            seconds += lane.step(tally, streams)
            steps += 1
        return seconds

    def open_loop(self, rate: float, tallies: dict[str, Tally], on_slice: Callable[[str, float], None]) -> None:
        seconds = self.config.seconds / self.config.traces
        order, shuffle = list(self.names), random.Random(self.config.seed).shuffle
        for number in range(self.config.traces):
            arrivals = poisson_arrivals(rate, seconds, self.config.seed + number)
            shuffle(order)
            for name in order:
                lane = self.lanes[name]
                lane.restart(self.config.seed + number)
                lane.run_trace(tallies[name], arrivals)
                on_slice(f"{rate:g} requests/s, trace {number + 1}/{self.config.traces}, {name}", seconds)

    def rows(self) -> list[dict]:
        """One row a load and policy that has been measured."""
        rows = []
        for (arrivals, load), tallies in self.tallies.items():
            closed = arrivals == "closed"
            where = {"arrivals": arrivals, "streams": load if closed else None, "rate": None if closed else load}
            for policy, tally in tallies.items():
                if tally.tokens_per_s:
                    rows.append(where | {"policy": policy, "temperature": self.config.temperature} | tally.row())
        return rows

    def summary(self) -> dict:
        """Scheduled policies against the best of the others, over the loads of the closed loop."""
        return summarise({int(load): t for (arrivals, load), t in self.tallies.items() if arrivals == "closed"})


def default_policies(block_size: int) -> tuple[str, ...]:
    if not block_size:
        return ("plain",)
    return ("plain", *(f"fixed-{n}" for n in range(1, block_size + 1)), "threshold", *BY_COST)


def run_and_report(config: LoadConfig, show_table: bool) -> bool:
    """The whole command: measure, print a table and the JSON line, draw the plots. False if it was interrupted."""
    console = Console(stderr=True)
    config.load_prompts()  # complain before the model is loaded
    if config.plots is not None:
        config.plots.mkdir(parents=True, exist_ok=True)
    with console.status("loading, and profiling where there is no profile"):
        target = config.load_target()
        drafter = make_drafter(config.drafter, target.source.name, target.decoder)
        bench = LoadBench(config, target, drafter)
    finished = False
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("warming up", total=bench.planned_seconds)
            bench.run(lambda text, done: progress.update(task, description=text, advance=done))
        finished = True
    except KeyboardInterrupt:
        console.print("interrupted; what was measured so far:")
    rows, summary = bench.rows(), bench.summary()
    parts = [load_table(rows), *([summary_table(summary)] if summary["scheduled"] else [])]
    if config.plots is not None:
        parts += [f"wrote {path}" for path in load_plots(rows, config.plots)]
    costs = asdict(bench.costs) if bench.costs is not None else None
    print_report({"rows": rows, "summary": summary, "costs": costs, "interrupted": not finished}, show_table, *parts)
    return finished
