"""What live decoding really accepts: rounds recorded while an engine runs, and figures of them by domain.

Shapes: N rounds, G slots of a block, S signals of a slot.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor

from dspark.drafters.interface import Drafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength
from dspark.spec.survivals import Floats

MACRO_AVERAGE = "macro average"  # stands where the domain does in the row of all domains


@dataclass
class Rounds:
    """Signals [N, G, S] of rounds whose whole block was verified, and how many tokens stayed [N]."""

    signals: Tensor
    accepted: Tensor

    @classmethod
    def together(cls, parts: Iterable["Rounds"]) -> "Rounds":
        """Those of several runs, one after the other."""
        return cls(*(torch.cat(tensors) for tensors in zip(*((r.signals, r.accepted) for r in parts))))


@dataclass
class RoundRecorder:
    """Stands where the engine keeps its calibration, passes confidence through and writes down what came of it."""

    signals: list[Tensor] = field(default_factory=list)
    accepted: list[Tensor] = field(default_factory=list)

    def confidence(self, signals: Tensor) -> Floats:
        return signals[..., 0].sigmoid().numpy(force=True)

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        whole = verify_lengths == signals.shape[1]  # the last rounds of an answer verify less
        self.signals.append(signals[whole].float().cpu())
        self.accepted.append(accepted[whole].cpu())

    def rounds(self) -> Rounds:
        return Rounds(torch.cat(self.signals), torch.cat(self.accepted))


def collect_rounds(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    streams: int,
    on_finish: Callable[[], None] = lambda: None,
) -> Rounds:
    """Decode all prompts, every draft token verified. Raises ValueError if no round was whole."""
    recorder = RoundRecorder()
    engine = Engine(
        target.decoder,
        drafter,
        FixedLength(drafter.block_size),
        eos_ids=target.eos_ids,
        config=EngineConfig(max_streams=streams, seed=0),
        calibration=recorder,
    )
    for prompt in prompts:
        engine.add(prompt, params)
    while engine.has_work:
        for new in engine.step():
            if new.sequence.finish_reason is not None:
                on_finish()
    rounds = recorder.rounds() if recorder.signals else Rounds(torch.empty(0, 0, 1), torch.empty(0))
    if not len(rounds.accepted):
        raise ValueError("no whole block was drafted; use more prompts or more new tokens")
    return rounds


def acceptance(accepted: Tensor, block_size: int) -> dict:
    """Figures of rounds whose whole block was verified; accepted [N]: draft tokens that stayed.

    `accepted_length` counts the bonus token; `conditional` is P(slot k is accepted | all slots before it were),
    None where no round came so far.
    """
    reached = [int((accepted >= k).sum()) for k in range(block_size + 1)]
    return {
        "rounds": len(accepted),
        "accepted_length": round(1 + accepted.double().mean().item(), 4),
        "conditional": [round(b / a, 4) if a else None for a, b in pairwise(reached)],
    }


def acceptance_by_domain(
    target: Target,
    drafter: Drafter,
    prompts: dict[str, list[list[int]]],
    params: SamplingParams,
    streams: int,
    on_finish: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Figures of one row a domain, then of their macro average; prompts are token ids by domain.

    Raises ValueError for prompts that cannot be used or give no whole round.
    """
    rows = []
    for domain, ids in sorted(prompts.items()):
        rounds = collect_rounds(target, drafter, ids, params, streams, on_finish)
        setting = {"temperature": params.temperature, "top_p": params.top_p, "domain": domain, "prompts": len(ids)}
        rows.append({**setting, **acceptance(rounds.accepted, drafter.block_size)})
    return [*rows, macro_average(rows)]


def macro_average(rows: list[dict]) -> dict:
    """Every domain weighs the same, however many rounds it had."""
    by_slot = [[c for c in column if c is not None] for column in zip(*(r["conditional"] for r in rows))]
    return {
        "temperature": rows[0]["temperature"],
        "top_p": rows[0]["top_p"],
        "domain": MACRO_AVERAGE,
        "prompts": sum(r["prompts"] for r in rows),
        "rounds": sum(r["rounds"] for r in rows),
        "accepted_length": round(mean(r["accepted_length"] for r in rows), 4),
        "conditional": [round(mean(values), 4) if values else None for values in by_slot],
    }
