"""What live decoding really accepts: rounds recorded while an engine runs, and figures of them by domain.

Shapes: N rounds, G slots of a block, S signals of a slot.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    """Signals [N, G, S] of rounds whose whole block was verified, how many draft tokens were accepted [N], and how many
    tokens the request got [N]: the target's own too, none behind one that ends it."""

    signals: Tensor
    accepted: Tensor
    committed: Tensor

    @classmethod
    def together(cls, parts: Iterable["Rounds"]) -> "Rounds":
        """Those of several runs, one after the other."""
        return cls(*(torch.cat(tensors) for tensors in zip(*((r.signals, r.accepted, r.committed) for r in parts))))


class Listener:
    """Stands where the engine keeps its calibration, passes confidence through and writes down what came of it."""

    def __init__(self):
        self.heard: list[tuple[Tensor, Tensor, Tensor]] = []  # signals [R, G, S], verified and accepted tokens [R]

    def confidence(self, signals: Tensor) -> Floats:
        return signals[..., 0].sigmoid().numpy(force=True)

    def observe(self, signals: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        self.heard.append((signals.cpu(), verify_lengths, accepted.cpu()))


def collect_rounds(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    streams: int,
    on_finish: Callable[[], None] = lambda: None,
) -> Rounds:
    """Decode all prompts, every draft token verified. Raises ValueError if no round was whole."""
    listener, policy = Listener(), FixedLength(drafter.block_size)
    config = EngineConfig(max_streams=streams, seed=0)
    engine = Engine(target.decoder, drafter, policy, target.eos_ids, config, listener)
    for prompt in prompts:
        engine.add(prompt, params)
    parts = []
    while engine.has_work:
        new_tokens = engine.step()
        for signals, verified, accepted in listener.heard:  # of this step
            whole = verified == drafter.block_size  # the last rounds of an answer verify less
            counts = torch.tensor([len(new.token_ids) for new in new_tokens[: len(whole)]])  # those that decoded
            parts.append(Rounds(signals[whole].float(), accepted[whole], counts[whole]))
        listener.heard.clear()
        for new in new_tokens:
            if new.sequence.finish_reason is not None:
                on_finish()
    if not any(len(part.accepted) for part in parts):
        raise ValueError("no whole block was drafted; use more prompts or more new tokens")
    return Rounds.together(parts)


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
        **rows[0],
        "domain": MACRO_AVERAGE,
        "prompts": sum(r["prompts"] for r in rows),
        "rounds": sum(r["rounds"] for r in rows),
        "accepted_length": round(mean(r["accepted_length"] for r in rows), 4),
        "conditional": [round(mean(values), 4) if values else None for values in by_slot],
    }
