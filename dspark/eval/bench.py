"""`dspark bench`: the same prompts through several systems in one run, interleaved so that drift hits all alike.

tokens/s is generated tokens over the wall time of their batches, prefill included.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.policy import drafting
from dspark.eval.identity import Difference, first_difference
from dspark.eval.machine import provenance
from dspark.eval.tasks import load_prompts
from dspark.models.layers import has_bf16_products
from dspark.models.loader import Target, load_target
from dspark.models.source import load_transformers
from dspark.sampling import SamplingParams

SYSTEMS = ("transformers", "plain", "ngram", "dspark")
DRAFTERS = {"plain": "none", "ngram": "ngram"}  # dspark: the one the user names


@dataclass(frozen=True)
class BenchConfig:
    """What to compare, on which prompts, under which load."""

    model: str = "smollm2-135m"
    drafter: str = "dspark"
    policy: str | None = None
    dtype: str = "bf16"
    device: str = "cpu"
    prompts: Path | None = None
    limit: int | None = None
    streams: tuple[int, ...] = (1, 8)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 128
    systems: tuple[str, ...] = SYSTEMS

    def __post_init__(self) -> None:
        unknown = [s for s in self.systems if s not in SYSTEMS]
        if unknown or not self.systems:
            raise ValueError(f"--systems takes {', '.join(SYSTEMS)}; not '{', '.join(unknown)}'")
        if not self.streams or min(self.streams) < 1:
            raise ValueError("--streams must be numbers of at least 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError("--temperatures must be numbers of at least 0")
        if self.max_new_tokens < 1:
            raise ValueError("--max-new-tokens must be at least 1")


@dataclass
class Tally:
    """Sums of one system at one temperature and number of streams."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0  # decoding rounds, summed over requests
    committed: int = 0  # tokens that these rounds committed
    steps: int = 0
    step_seconds: float = 0.0
    draft_seconds: float = 0.0
    by_domain: dict[str, list[float]] = field(default_factory=dict)  # domain -> [tokens, seconds, rounds, committed]

    def row(self, system: str, policy: str, temperature: float, streams: int) -> dict:
        def ratio(a: float, b: float, digits: int = 3) -> float | None:
            return round(a / b, digits) if b else None

        return {
            "system": system,
            "policy": policy,
            "temperature": temperature,
            "streams": streams,
            "tokens_per_s": ratio(self.tokens, self.seconds, 2),
            "per_stream_tokens_per_s": ratio(self.tokens, self.seconds * streams, 2),
            "accepted_length": ratio(self.committed, self.rounds),
            "ms_per_round": ratio(1e3 * self.step_seconds, self.steps, 2),
            "draft_share": ratio(self.draft_seconds, self.step_seconds, 4),
            "by_domain": {
                domain: {"tokens_per_s": ratio(t, s, 2), "accepted_length": ratio(c, r)}
                for domain, (t, s, r, c) in sorted(self.by_domain.items())
            },
        }


class EngineSystem:
    """Our engine with one drafter, or none."""

    def __init__(self, target: Target, drafter: str, policy: str | None, max_streams: int):
        self.parts = drafting(target, drafter, policy)
        self.engine = Engine(
            target.decoder,
            self.parts.drafter,
            self.parts.scheduler,
            eos_ids=target.eos_ids,
            config=EngineConfig(max_streams=max_streams, seed=0),
            calibration=self.parts.calibration,
        )

    @property
    def policy(self) -> str:
        return self.parts.policy

    def run(self, prompts: list[list[int]], params: list[SamplingParams], tally: Tally) -> list[list[int]]:
        before = (self.engine.times.rounds, self.engine.times.total, self.engine.times.draft)
        sequences = [self.engine.add(ids, p) for ids, p in zip(prompts, params, strict=True)]
        while self.engine.has_work:
            self.engine.step()
        times = self.engine.times
        tally.steps += times.rounds - before[0]
        tally.step_seconds += times.total - before[1]
        tally.draft_seconds += times.draft - before[2]
        for s in sequences:
            tally.rounds += s.rounds
            tally.committed += s.rounds + s.accepted_tokens
        return [s.output_ids for s in sequences]


class TransformersSystem:
    """`generate` of Transformers, all prompts of a batch padded on the left.

    It runs in the model's own precision; a bf16 model on a CPU without bf16 instructions in fp32, since in bf16 its
    prompt pass alone would take minutes there.
    """

    policy = "generate"

    def __init__(self, target: Target):
        decoder = target.decoder
        dtype = decoder.dtype if has_bf16_products(decoder.device) else decoder.compute_dtype
        self.model = load_transformers(target.source, dtype).to(target.decoder.device)  # pyright: ignore
        self.eos_ids = sorted(target.eos_ids)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], params: list[SamplingParams], tally: Tally) -> list[list[int]]:
        pad, longest, p = self.eos_ids[0], max(map(len, prompts)), params[0]
        ids = torch.tensor([[pad] * (longest - len(x)) + x for x in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=self.model.device)
        sampling = {"do_sample": False} if p.greedy else {"do_sample": True, "temperature": p.temperature, "top_k": 0}
        if p.seed is not None:
            torch.manual_seed(p.seed)
        out = self.model.generate(  # pyright: ignore
            ids,
            attention_mask=mask,
            max_new_tokens=p.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self.eos_ids,
            **sampling,
        )
        return [self.trim(row[longest:].tolist()) for row in out]

    def trim(self, tokens: list[int]) -> list[int]:
        """Up to and including the first end token; what follows is padding."""
        ends = [i for i, t in enumerate(tokens) if t in self.eos_ids]
        return tokens[: ends[0] + 1] if ends else tokens


@dataclass
class BenchResult:
    """Rows for the table, answers by (system, temperature, streams), prompts as token ids."""

    rows: list[dict]
    answers: dict[tuple[str, float, int], list[list[int]]]
    prompts: list[list[int]]


def run_bench(config: BenchConfig, target: Target, on_batch=lambda _: None) -> BenchResult:
    """Time all systems; on_batch(text) before each batch. Raises ValueError for prompts that do not fit."""
    from dspark.engine.llm import encode_prompt

    prompts = load_prompts(config.prompts, config.limit)
    ids = [encode_prompt(target.tokenizer, p.turns[0]) for p in prompts]
    systems = {name: make_system(name, config, target) for name in config.systems}
    rows, answers = [], {}
    for streams in config.streams:
        batches = [range(len(prompts))[i : i + streams] for i in range(0, len(prompts), streams)]
        for temperature in config.temperatures:
            tallies = {name: Tally() for name in systems}
            found = {name: [[] for _ in prompts] for name in systems}
            for number, batch in enumerate(batches):
                # Each batch starts with another system: none always runs on a machine another one has heated.
                order = list(systems)[number % len(systems) :] + list(systems)[: number % len(systems)]
                for name in order:
                    on_batch(
                        f"{streams} streams, temperature {temperature:g}: batch {number + 1}/{len(batches)} {name}"
                    )
                    params = [
                        SamplingParams(temperature=temperature, max_new_tokens=config.max_new_tokens) for k in batch
                    ]
                    run_batch(
                        systems[name],
                        [ids[k] for k in batch],
                        params,
                        tallies[name],
                        found[name],
                        batch,
                        prompts,
                    )
            for name, tally in tallies.items():
                rows.append(tally.row(name, systems[name].policy, temperature, streams))
                answers[name, temperature, streams] = found[name]
    return BenchResult(rows, answers, ids)


def make_system(name: str, config: BenchConfig, target: Target) -> EngineSystem | TransformersSystem:
    """Build one system and warm it up, so that no first-call cost is timed."""
    if name == "transformers":
        system = TransformersSystem(target)
    else:
        system = EngineSystem(
            target, DRAFTERS.get(name, config.drafter), config.policy if name == "dspark" else None, max(config.streams)
        )
    system.run([[1, 2, 3, 4]], [SamplingParams(max_new_tokens=4, ignore_eos=True)], Tally())
    return system


def run_batch(system, ids, params, tally: Tally, found, batch, prompts) -> None:
    """Run one batch on one system and book it."""
    rounds, committed = tally.rounds, tally.committed
    started = time.perf_counter()
    outputs = system.run(ids, params, tally)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, outputs))
    tally.tokens += tokens
    tally.seconds += seconds
    if len({prompts[k].domain for k in batch}) == 1:  # in mixed batches time belongs to no domain
        sums = tally.by_domain.setdefault(prompts[batch[0]].domain, [0, 0, 0, 0])
        for i, value in enumerate((tokens, seconds, tally.rounds - rounds, tally.committed - committed)):
            sums[i] += value
    for k, output in zip(batch, outputs):
        found[k] = output


def check_identity(config: BenchConfig, target: Target, dtype: str) -> tuple[str, list[Difference]]:
    """Greedy DSpark against greedy plain decoding on all prompts in one dtype: ("n/n", differences)."""
    streams = max(config.streams)
    only = replace(config, dtype=dtype, streams=(streams,), temperatures=(0.0,), systems=("plain", "dspark"))
    return compare(run_bench(only, target), target, streams)


def compare(result: BenchResult, target: Target, streams: int) -> tuple[str, list[Difference]]:
    plain, fast = (result.answers[name, 0.0, streams] for name in ("plain", "dspark"))
    found = [first_difference(target.decoder, *row) for row in zip(result.prompts, plain, fast, strict=True)]
    differences = [d for d in found if d is not None]
    return f"{len(plain) - len(differences)}/{len(plain)}", differences


def run_and_report(config: BenchConfig, show_table: bool) -> None:
    """The whole command: measure, check identity in both dtypes, print a table and the JSON line."""
    from rich.console import Console

    from dspark.eval.report import bench_table

    console = Console(stderr=True)
    load_prompts(config.prompts, config.limit)  # complain before the model is loaded
    target = load_target(config.model, config.dtype, config.device)
    with console.status("loading") as status:
        result = run_bench(config, target, status.update)
        identical, differences = {}, []
        if "dspark" in config.systems:
            for dtype in ("fp32", "bf16"):
                status.update(f"greedy identity in {dtype}")
                if dtype == config.dtype and "plain" in config.systems and 0.0 in config.temperatures:
                    share, found = compare(result, target, max(config.streams))
                else:
                    other = target if dtype == config.dtype else load_target(config.model, dtype, config.device)
                    share, found = check_identity(config, other, dtype)
                identical[dtype] = share
                differences += [{"dtype": dtype, **d.__dict__} for d in found]
    if show_table:
        Console().print(bench_table(result.rows))
        for dtype, share in identical.items():
            print(f"greedy output identical to plain decoding, {dtype}: {share}")
        for d in differences:
            print(f"  {d}")
    print(json.dumps({"rows": result.rows, "identical_greedy": identical, "differences": differences, **provenance()}))
