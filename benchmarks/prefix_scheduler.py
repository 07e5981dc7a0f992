"""What does it cost to choose verify lengths? Each prefix scheduler, from 1 to 4,096 requests of 7 draft tokens.

The choice sits between two model passes, so it is pure loss: at 64 requests a step takes about 100 ms or more on this
kind of machine, and 1 % of it, 1 ms, is the limit. Sorting all n = 7 R slots is the only part that grows faster than
n; for a few requests the time is that of some thirty numpy calls of 1 to 5 µs.

    python benchmarks/prefix_scheduler.py
"""

import json
import statistics
import time

import numpy as np

from dspark.machine import provenance
from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import (
    FixedLength,
    Foresight,
    PrefixScheduler,
    StaleBudget,
    Threshold,
    ThroughputGreedy,
)
from dspark.spec.walk import Load

SLOTS = 7
REQUESTS = (1, 4, 16, 64, 256, 1024, 4096)
ROUNDS = 60


def jagged_costs() -> CostTable:
    """Seconds in the shape of the profile of a small machine: tiles of 8 rows, then linear; 24 sizes."""
    sizes = np.unique(np.geomspace(1, 400, 30).astype(int))
    seconds = 0.02 + 0.001 * np.ceil(sizes / 8) * 8
    return CostTable("m", "bf16", "here", tuple(sizes.tolist()), tuple(seconds.tolist()), (1, 64), (2e-3, 9e-3), 1e-3)


def median_microseconds(scheduler: PrefixScheduler, requests: int) -> tuple[float, float]:
    """(to_draft, choose), each on other confidences of a drafter that is mostly right."""
    generator = np.random.default_rng(0)
    load = Load(tuple(range(requests)))
    asking, choosing = [], []
    for _ in range(ROUNDS):
        confidence = generator.beta(8, 1.5, (requests, SLOTS))
        started = time.perf_counter()
        scheduler.to_draft(load)
        slots = min(scheduler.slots_to_draft(load), SLOTS)
        asked = time.perf_counter()
        scheduler.choose(confidence[:, :slots], np.full(requests, slots), load)
        asking.append(asked - started)
        choosing.append(time.perf_counter() - asked)
    return statistics.median(asking) * 1e6, statistics.median(choosing) * 1e6


def main() -> None:
    costs = jagged_costs()
    rows = []
    for requests in REQUESTS:
        schedulers: dict[str, PrefixScheduler] = {
            "fixed": FixedLength(SLOTS),
            "threshold": Threshold(0.5),
            "greedy": ThroughputGreedy(costs),
            "stale": StaleBudget(costs),
            "foresight": Foresight(costs),
        }
        row: dict[str, float] = {"requests": requests}
        for name, scheduler in schedulers.items():
            asking, choosing = median_microseconds(scheduler, requests)
            row[f"{name}_to_draft_us"] = round(asking, 1)
            row[f"{name}_choose_us"] = round(choosing, 1)
        print(row)
        rows.append(row)
    print(json.dumps({"slots": SLOTS, "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
