"""Measuring what a step costs here: the cost table that prefix schedulers decide by (design §5).

Shapes: B batch tokens of a target forward, R requests of a draft pass.
"""

import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from dspark.config import read_json, write_json
from dspark.drafters.interface import Drafter
from dspark.drafters.load import drafter_folder
from dspark.engine.batch import Batch
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.kv_cache import KVCache, Region, slot_bytes
from dspark.engine.scheduler import Chunk
from dspark.engine.sequence import Sequence
from dspark.engine.times import StepTimes
from dspark.machine import machine_name
from dspark.models.decoder import Decoder
from dspark.models.download import cache_folder
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from dspark.spec.calibration import Calibration
from dspark.spec.cost_table import CostTable
from dspark.spec.live_costs import at_present
from dspark.spec.walk import survival, walk

BATCH_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 16, 20, 24, 25, 32, 40, 48, 64, 80, 96, 128, 192, 256, 320)
QUICK_BATCH_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
QUICK_REQUESTS = (1, 4, 16, 64)


@dataclass(frozen=True)
class ProfileConfig:
    """Which sizes are timed, how often and how long each, and how many tokens every request has in the cache."""

    batch_tokens: tuple[int, ...] = BATCH_TOKENS
    requests: tuple[int, ...] = REQUESTS
    repeats: int = 9
    context: int = 192
    most_seconds: float = 1.0  # of a size: where CPUs are slow a forward of 256 tokens takes them all

    def __post_init__(self) -> None:
        for name in ("repeats", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")


QUICK = ProfileConfig(QUICK_BATCH_TOKENS, QUICK_REQUESTS, repeats=5)
AGAIN = ProfileConfig((1, 16), (1,), repeats=3, most_seconds=0.1)  # of a kept profile, when an engine starts
MOST_REQUESTS = 64  # with a context of their own; more tokens than that are timed as several of each
TAKEN_IN = 3  # committed tokens of a request that its drafter takes in before it drafts


def measure_costs(
    target: Target,
    drafter: Drafter | None,
    config: ProfileConfig,
    on_done: Callable[[str], None] = lambda _: None,
    step_seconds: float | None = None,
) -> CostTable:
    """Median seconds by size, forced monotone. The drafter must not be serving: its storage is made anew.
    step_seconds: what a step costs besides; None: measured too.

    A target forward of B tokens is timed as B requests of one token, with its logits and their argmax; a draft pass
    with the taking in of committed tokens before it and the confidence of its tokens after it. There are MOST_REQUESTS
    contexts, or as many as fit the memory that an engine has by default. For more batch tokens than that each request
    gets several rows, and what reading the missing contexts would add is estimated from two forwards of equally many
    tokens, over many contexts and over few. Raises ValueError for a context that the model does not have.
    """
    decoder = target.decoder
    most = max(config.batch_tokens[-1], config.requests[-1])
    gamma = drafter.block_size if drafter is not None else 0
    tap_layers = drafter.tap_layers if drafter is not None else ()
    per_slot = slot_bytes(decoder.config, decoder.kv_dtype) + (drafter.slot_bytes if drafter is not None else 0)
    room = config.context + max(1 + gamma, 2 + config.repeats)
    regions = min(most, MOST_REQUESTS, max(1, int(EngineConfig.kv_gib * 2**30 / (per_slot * room))))
    room = max(room, config.context - (-most // regions))
    if room > (positions := decoder.config.max_position_embeddings):
        raise ValueError(f"a context of {config.context} tokens leaves no room in the model's {positions}: give less")
    cache = KVCache(decoder.config, regions * room, decoder.kv_dtype, decoder.device)
    for storage in cache.storage:
        storage.normal_()
    tokens = [1] * (config.context + 1)
    places = [Region(i * room, room, room, tokens, length=config.context) for i in range(regions)]
    sequences = [Sequence(i, tokens, SamplingParams(), 0, region=place) for i, place in enumerate(places)]
    calibration = Calibration.identity(gamma)
    shape = regions * config.context, decoder.config.hidden_size
    taps = torch.randn(shape, dtype=decoder.compute_dtype, device=decoder.device)

    @torch.inference_mode()
    def forward(batch_tokens: int, requests: int) -> None:
        rows = [len(part) for part in np.array_split(np.arange(batch_tokens), requests)]
        batch = Batch.of([Chunk(s, 1, [1] * (n - 1)) for s, n in zip(sequences, rows)], decoder.device)
        attention = batch.attention(cache, decoder.config.group_size)
        output = decoder.forward(batch.tokens, batch.positions, attention, tap_layers)
        decoder.likeliest(decoder.logits(output.hidden)).tolist()

    def take_in(requests: int, count: int) -> None:
        """The last `count` tokens of so many contexts."""
        if drafter is not None and tap_layers:
            positions = torch.arange(config.context - count, config.context).repeat(requests)
            slots = positions + torch.arange(0, requests * room, room).repeat_interleave(count)
            rows = (t.to(decoder.device) for t in (torch.ones_like(slots), positions, slots))
            drafter.extend([taps[: len(slots)]] * len(tap_layers), *rows)

    def draft(requests: int, slots: int) -> None:
        assert drafter is not None
        take_in(min(requests, regions), min(TAKEN_IN, config.context))
        drafted = drafter.propose([sequences[i % regions] for i in range(requests)], slots)
        lengths = drafted.lengths.cpu().numpy()
        walk(survival(calibration.confidence(drafted.signals), lengths), lengths)

    if drafter is not None:
        drafter.allocate(regions * room)
        take_in(regions, config.context)  # the drafter's context must hold finite numbers
    requests = config.requests if drafter is not None else ()
    short = -(-gamma // 4)  # slots of the blocks that tell what a draft costs by its length
    few = max(1, regions // (1 + gamma))
    many = min(few * (1 + gamma), regions)
    # As in decoding, a size comes after itself, forward after draft after forward: a cache that holds most of the
    # weights then holds those. After another size small ones took 1.4 times as long, and drafting looked cheap.
    jobs: dict[tuple[str, int], Callable[[], None]] = {}
    for n in sorted({*config.batch_tokens, *requests}):
        jobs["before", n] = partial(forward, n, min(n, regions))
        if n in requests:
            jobs["draft", n] = partial(draft, n, gamma)
            if short < gamma:
                jobs |= {("between", n): jobs["before", n], ("short draft", n): partial(draft, n, short)}
        jobs |= {("target", n): jobs["before", n]} if n in config.batch_tokens else {}
    # As many tokens of fewer requests: what is saved was spent on reading contexts.
    for name, count in (("many contexts", many), ("few contexts", few)):
        jobs[f"before {name}", 0] = jobs[name, 0] = partial(forward, few * (1 + gamma), count)
    seconds = median_seconds(jobs, config, on_done)
    saved = max(0.0, seconds["many contexts", 0] - seconds["few contexts", 0])
    context_seconds = saved / max(1, many - few)
    target_seconds = (seconds["target", n] + context_seconds * max(0, n - regions) for n in config.batch_tokens)
    draft_seconds = rising(seconds["draft", n] for n in requests)
    short_draft_seconds = rising(seconds["short draft", n] for n in requests if short < gamma)
    return CostTable(
        **measured_on(target),
        batch_tokens=config.batch_tokens,
        target_seconds=rising(target_seconds),
        requests=requests,
        draft_seconds=draft_seconds,
        step_seconds=around_a_step(decoder, config) if step_seconds is None else step_seconds,
        context_seconds=context_seconds,
        slots=max(1, gamma),
        short_slots=max(1, short),
        short_draft_seconds=tuple(map(min, short_draft_seconds, draft_seconds)),
    )


def rising(seconds: Iterable[float]) -> tuple[float, ...]:
    """Noise must not make more work look cheaper."""
    return tuple(accumulate(seconds, max))


def measured_on(target: Target) -> dict[str, str]:
    """What a table belongs to, as its fields name it."""
    decoder = target.decoder
    dtype = str(decoder.dtype).removeprefix("torch.")
    return {"model": target.source.name, "dtype": dtype, "machine": machine_name(decoder.device)}


def around_a_step(decoder: Decoder, config: ProfileConfig) -> float:
    """Median seconds of a step of plain decoding, one stream, besides the target forward."""
    engine = Engine(decoder, config=EngineConfig(1, config.context + 2 + config.repeats, reuse_prefixes=False))
    engine.add([1] * config.context, SamplingParams(max_new_tokens=2 + config.repeats, ignore_eos=True))
    seconds = []
    while engine.has_work:
        engine.times = StepTimes()
        engine.step()
        if engine.times.rounds:
            seconds.append(engine.times.total - engine.times.target)
    return statistics.median(seconds)


def median_seconds(
    jobs: dict[tuple[str, int], Callable[[], None]], config: ProfileConfig, on_done: Callable[[str], None]
) -> dict[tuple[str, int], float]:
    """Of each job. They take turns, so that a slow phase of a shared machine slows one turn of all, not all of one.

    The first turn is a warm-up, but for jobs so long that it counts too; those are not repeated as often.
    """
    times: dict[tuple[str, int], list[float]] = {name: [] for name in jobs}
    for turn in range(1 + config.repeats):
        for name, job in jobs.items():
            if sum(times[name]) < config.most_seconds:
                started = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - started)
        on_done(f"turn {turn} of {config.repeats}")
    return {name: statistics.median(kept[1:] or kept) for name, kept in times.items()}


def profile_path(target: Target, drafter: str) -> Path:
    """Where the profile that the engine takes by itself is kept: one for each shape of a drafter, trained on or not.

    Raises ValueError if there is no such drafter.
    """
    folder = drafter_folder(drafter, target.source.name)
    shape = drafter if folder is None else (folder / "config.json").read_text()
    key = f"{target.source.name} {target.decoder.dtype} {shape} {machine_name(target.decoder.device)}"
    return cache_folder() / "profiles" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_profile(path: Path, target: Target) -> CostTable:
    """A stored profile. Raises ValueError if it is damaged or of another model, dtype or machine."""
    table = read_json(CostTable, path)
    for name, wanted in measured_on(target).items():
        if (found := getattr(table, name)) != wanted:
            message = f"the cost table was measured for {name} '{found}', not '{wanted}'; run `dspark profile` again"
            raise ValueError(message)
    return table


def cost_table(target: Target, drafter: Drafter | None, name: str, profile: Path | None = None) -> CostTable:
    """The profile given as it is; or the one kept of this model, drafter and machine, taken now in seconds where there
    is none, and brought to what a few sizes of it take at present where there is.

    Raises ValueError for a given one that cannot be read or is of another model, dtype or machine.
    """
    if profile is not None:
        table = load_profile(profile, target)
        if drafter is not None and (not table.requests or table.slots != drafter.block_size):
            blocks = f"blocks of {table.slots} tokens" if table.requests else "no drafter"
            raise ValueError(
                f"'{profile}' was measured with {blocks}, '{name}' drafts {drafter.block_size}: "
                f"run `dspark profile --drafter {name}`"
            )
        return table
    path = profile_path(target, name)
    context = min(QUICK.context, 1 + target.decoder.config.max_position_embeddings // 2)
    if path.exists():
        try:
            kept = load_profile(path, target)
        except ValueError:
            path.unlink()  # ours and damaged: take it anew
        else:
            again = replace(AGAIN, context=context)
            return at_present(kept, measure_costs(target, drafter, again, step_seconds=kept.step_seconds))
    print("measuring what a step costs on this machine (once, a few seconds) ...", file=sys.stderr)
    table = measure_costs(target, drafter, replace(QUICK, context=context))
    write_json(table, path)
    return table
