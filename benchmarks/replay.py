"""What prefix schedulers decide, without noise: recorded drafts, each step taking what a cost table says.

Greedy decoding commits the same tokens whatever is drafted and verified. So what a draft at each position of an answer
signals, and how much of it is accepted, is recorded once, and any policy can be replayed over that at any load. Prompts
are left out, and the time that choosing takes (`prefix_scheduler.py`). Costs are a profile's, times `--factors` that
the schedulers have to find out: of a step of one token, of more tokens, of short drafts, of longer ones.

    python benchmarks/replay.py --limit 60 --factors 0.8,1.5,1.3,1.5
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.engine import EngineConfig
from dspark.engine.llm import LLM
from dspark.engine.policy import BY_COST
from dspark.engine.profile import cost_table
from dspark.eval.setting import Setting
from dspark.machine import provenance
from dspark.models.attention import packed_attention
from dspark.sampling import SamplingParams
from dspark.spec.cost_table import CostTable
from dspark.spec.live_costs import StepTaken, scaled
from dspark.spec.prefix_scheduler import FixedLength, PrefixScheduler
from dspark.spec.walk import Load


class Answer(NamedTuple):
    """Of drafts after each of its tokens but the last: confidence [T, G], and how many tokens would be accepted [T]."""

    confidence: NDArray[np.float64]
    accepted: list[int]


@torch.inference_mode()
def record(llm: LLM, prompt: list[int], tokens: list[int]) -> Answer:
    """What the drafter proposes after each token. A block is written over the context after its anchor, so the anchors
    come from the last one backwards."""
    engine, drafter = llm.engine, llm.engine.drafter
    assert drafter is not None
    text, places = prompt + tokens, torch.arange(len(prompt) + len(tokens))
    attention = packed_attention([len(text)], engine.target.config, engine.target.kv_dtype, places.device)
    taps = engine.target.forward(torch.tensor(text), places, attention, drafter.tap_layers).taps
    drafter.extend(taps, torch.tensor(text), places, places)
    confidence, accepted = [], []
    for anchor in range(len(text) - 2, len(prompt) - 1, -1):
        request = SimpleNamespace(token_ids=text[: anchor + 1], params=SamplingParams(), first_slot=0)
        draft = drafter.propose([request], drafter.block_size)  # pyright: ignore
        confidence.append(engine.calibration.confidence(draft.signals)[0])
        agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(draft.tokens[0].tolist(), text[anchor + 1 :]))
        accepted.append(len(list(agreeing)))
    return Answer(np.array(confidence[::-1]), accepted[::-1])


class Replayed(NamedTuple):
    tokens_per_s: float
    plain_rounds: float  # share
    verify_length: float  # mean


def replay(scheduler: PrefixScheduler, answers: list[Answer], costs: CostTable, streams: int, tokens: int) -> Replayed:
    """So many tokens, in a closed loop of so many streams."""
    draws, deck, seconds, committed, rounds, plain, verified = random.Random(0), [], 0.0, 0, 0, 0, 0
    running: list[tuple[int, Answer, int]] = []  # id, answer, place
    ids = count()
    while committed < tokens:
        while len(running) < streams:
            if not deck:
                deck = draws.sample(answers, len(answers))
            running.append((next(ids), deck.pop(), 0))
        load, slots = Load(tuple(i for i, _, _ in running)), 0
        left = [len(answer.accepted) - place for _, answer, place in running]
        wanted = [i for i in scheduler.to_draft(load) if left[i] > 1]
        lengths = np.zeros(streams, np.int64)
        if wanted:
            slots = min(scheduler.slots_to_draft(load), answers[0].confidence.shape[1])
            confidence = np.zeros((streams, slots))
            for i in wanted:
                _, answer, place = running[i]
                confidence[i], lengths[i] = answer.confidence[place, :slots], min(slots, left[i] - 1)
            lengths = scheduler.choose(confidence, lengths, load)
        batch_tokens = streams + int(lengths.sum())
        drafting = float(costs.draft(len(wanted), slots or None))
        other = costs.step_seconds + float(costs.target(batch_tokens, streams))
        scheduler.observe(StepTaken(streams, batch_tokens, len(wanted), slots, drafting, other))
        seconds, rounds = seconds + drafting + other, rounds + 1
        plain, verified = plain + (not wanted), verified + int(lengths.sum())
        steps = [1 + min(answer.accepted[place], n) for (_, answer, place), n in zip(running, lengths.tolist())]
        committed += sum(steps)
        running = [(i, answer, place + n) for (i, answer, place), n in zip(running, steps)]
        running = [(i, answer, place) for i, answer, place in running if place < len(answer.accepted)]
    return Replayed(committed / seconds, plain / rounds, verified / (rounds * streams))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="JSON lines (default: those that come with dspark)")
    parser.add_argument("--limit", type=int, help="use only the first N prompts")
    parser.add_argument("--streams", default="1,2,4,8,16,32,64")
    parser.add_argument("--factors", default="1,1,1,1")
    parser.add_argument("--tokens", type=int, default=4000, help="of a stream up to eight, of eight beyond")
    args = parser.parse_args()
    prompts = Setting(prompts=args.prompts, limit=args.limit).load_prompts()
    llm = LLM(policy="fixed-1", config=EngineConfig(max_streams=16))
    profile = cost_table(llm.target, copy.copy(llm.engine.drafter), "dspark")  # which makes storage of its own
    costs = scaled(profile, *map(float, args.factors.split(",")))
    params, answers = SamplingParams(max_new_tokens=128), []
    asked = [llm.submit([{"role": "user", "content": prompt.turns[0]}], params) for prompt in prompts]
    while llm.engine.has_work:
        llm.engine.step()
    for sequence in asked:
        if len(sequence.output_ids) > 3:
            answers.append(record(llm, sequence.token_ids[: sequence.prompt_length], sequence.output_ids))

    policies: dict[str, Callable[[], PrefixScheduler]] = {
        f"fixed-{n}" if n else "plain": lambda n=n: FixedLength(n) for n in range(llm.engine.block_size + 1)
    }
    rows = []
    for streams in map(int, args.streams.split(",")):
        run = {name: make() for name, make in policies.items()}
        run |= {name: make(profile) for name, make in BY_COST.items()}
        results = {n: replay(s, answers, costs, streams, args.tokens * min(streams, 8)) for n, s in run.items()}
        best = max(policies, key=lambda name: results[name].tokens_per_s)
        row = {"streams": streams, "best": best, "x_plain": results[best].tokens_per_s / results["plain"].tokens_per_s}
        row |= {f"{n}/best": results[n].tokens_per_s / results[best].tokens_per_s for n in BY_COST}
        row |= {"verify_length": results["foresight"].verify_length, "plain_rounds": results["foresight"].plain_rounds}
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        print(rows[-1])
    print(json.dumps({"factors": args.factors, "prompts": len(answers), "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
