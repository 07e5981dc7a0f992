"""From names to what an engine drafts with: drafter, prefix scheduler, calibration."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dspark.drafters.interface import Drafter
from dspark.drafters.load import load_calibration, make_drafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.profile import cost_table
from dspark.models.loader import Target
from dspark.spec.calibration import Calibration, Calibrator, OnlineCalibration
from dspark.spec.cost_table import CostTable
from dspark.spec.prefix_scheduler import (
    FixedLength,
    Foresight,
    PrefixScheduler,
    StaleBudget,
    Threshold,
    ThroughputGreedy,
)

BY_COST = {"greedy": ThroughputGreedy, "stale": StaleBudget, "foresight": Foresight}
POLICIES = "fixed-1, fixed-2, ..., threshold, threshold-0.7, greedy, stale, foresight"


def check_policy(name: str) -> None:
    """Raise ValueError unless this is a policy's name."""
    if name not in BY_COST and not re.fullmatch(r"fixed-[1-9]\d*|threshold(-0?\.\d+)?", name):
        raise ValueError(f"a policy is one of {POLICIES}; not '{name}'")


def make_policy(name: str, block_size: int, costs: Callable[[], CostTable]) -> PrefixScheduler:
    """The prefix scheduler of that name; costs() is asked only if it needs them.

    Raises ValueError for a name that is none and a fixed length longer than the block.
    """
    check_policy(name)
    if name in BY_COST:
        return BY_COST[name](costs())
    kind, _, value = name.partition("-")
    if kind == "threshold":
        return Threshold(float(value or 0.5))
    if int(value) > block_size:
        raise ValueError(f"'{name}' is longer than the drafter's block of {block_size} tokens")
    return FixedLength(int(value))


class Drafting(NamedTuple):
    """How an engine drafts. policy: the name of `scheduler`."""

    drafter: Drafter | None
    scheduler: PrefixScheduler
    calibration: Calibrator | None
    policy: str

    def engine(self, target: Target, config: EngineConfig) -> Engine:
        """Raises ValueError if the memory of `config` holds no token."""
        return Engine(target.decoder, self.drafter, self.scheduler, target.eos_ids, config, self.calibration)


def make_calibrator(bound: Drafter, drafter: str, model: str, online: bool) -> Calibrator | None:
    """The side file of the drafter's checkpoint, if there is one; online: it goes on learning from what is verified.

    Raises ValueError for one that is damaged or of blocks of another length.
    """
    calibration = load_calibration(drafter, model)
    if calibration is not None and len(calibration.temperatures) < bound.block_size:
        raise ValueError(
            f"the calibration of '{drafter}' is for blocks of {len(calibration.temperatures)} tokens, the drafter's "
            f"have {bound.block_size}: run 'dspark calibrate --drafter {drafter}'"
        )
    return OnlineCalibration(calibration or Calibration.identity(bound.block_size)) if online else calibration


def drafting(
    target: Target,
    drafter: str,
    policy: str | None,
    online_calibration: bool = False,
    profile: Path | None = None,
) -> Drafting:
    """drafter: as for `make_drafter`; policy: see POLICIES; online_calibration: see `make_calibrator`; profile: what
    `dspark profile --out` wrote, in place of the one kept.

    Without a policy a trained drafter gets `foresight`; drafters without a confidence of their own have all of
    their tokens verified. Foresight measures the machine's costs once, in a few seconds. Raises ValueError for
    names that mean nothing and for a drafter that does not fit.
    """
    if policy is not None:
        check_policy(policy)
    name = target.source.name
    bound = make_drafter(drafter, name, target.decoder)
    if bound is None:
        return Drafting(None, FixedLength(0), None, "plain")
    if policy is None:
        policy = "foresight" if bound.has_confidence else f"fixed-{bound.block_size}"
    scheduler = make_policy(policy, bound.block_size, lambda: cost_table(target, bound, drafter, profile))
    return Drafting(bound, scheduler, make_calibrator(bound, drafter, name, online_calibration), policy)
