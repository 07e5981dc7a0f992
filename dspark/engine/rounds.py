"""What live decoding really accepts: rounds recorded while an engine runs, and figures of them by domain.

Shapes: N rounds, G slots of a block, S signals of a slot.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor

from dspark.drafters.interface import Drafter
from dspark.engine.engine import Engine, EngineConfig, NewTokens
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from dspark.spec.prefix_scheduler import FixedLength
from dspark.spec.survivals import Floats

MACRO_AVERAGE = "macro average"  # stands where the domain does in the row of all domains


@dataclass
class Rounds:
    """Signals [N, G, S] of rounds whose whole block was verified, how many draft tokens were accepted [N], and how many
    tokens the request got [N]: the target's own too, none behind one that ends it."""

    signals: Tensor
    accepted: Tensor
    committed: Tensor

    @classmethod
    def together(cls, parts: Iterable["Rounds"]) -> "Rounds":
        """Those of several runs, one after the other."""
        return cls(*(torch.cat(tensors) for tensors in zip(*((r.signals, r.accepted, r.committed) for r in parts))))


@dataclass
class RoundRecorder:
    """Stands where the engine keeps its calibration, passes confidence through and writes down what came of it."""

    signals: list[Tensor] = field(default_factory=list)
    accepted: list[Tensor] = field(default_factory=list)
    committed: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None  # which of the requests observed in this step

    def confidence(self, signals: Tensor) -> Floats:
        return signals[..., 0].sigmoid().numpy(force=True)

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        self.whole = verify_lengths == signals.shape[1]  # the last rounds of an answer verify less
        self.signals.append(signals[self.whole].float().cpu())
        self.accepted.append(accepted[self.whole].cpu())

    def commit(self, new_tokens: list[NewTokens]) -> None:
        """After the step: what it gave out, to the requests observed first."""
        if self.whole is not None:
            counts = torch.tensor([len(new.token_ids) for new in new_tokens[: len(self.whole)]])
            self.committed.append(counts[self.whole])
            self.whole = None

    def rounds(self) -> Rounds:
        return Rounds(*(torch.cat(parts) for parts in (self.signals, self.accepted, self.committed)))


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
        new_tokens = engine.step()
        recorder.commit(new_tokens)
        for new in new_tokens:
            if new.sequence.finish_reason is not None:
                on_finish()
    if not sum(map(len, recorder.accepted)):
        raise ValueError("no whole block was drafted; use more prompts or more new tokens")
    return recorder.rounds()


def acceptance(rounds: Rounds) -> dict:
    """Figures of rounds whose whole block was verified.

    `accepted_length` is the mean of the tokens committed, the target's own included; `conditional` is P(slot k is
    accepted | all slots before it were), None where no round came so far. Slots behind the end of an answer count
    nowhere.
    """
    kept = torch.minimum(rounds.accepted, rounds.committed)  # draft tokens that stayed
    asked = kept - (rounds.committed <= rounds.accepted).long()  # the last slot that was, from 0
    conditional = []
    for k in range(rounds.signals.shape[1]):
        reached = int((asked >= k).sum())
        conditional.append(round(int((kept > k).sum()) / reached, 4) if reached else None)
    length = round(rounds.committed.double().mean().item(), 4)
    return {"rounds": len(rounds.accepted), "accepted_length": length, "conditional": conditional}


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
        rows.append({**setting, **acceptance(rounds)})
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
