"""`dspark bench`: the same prompts through several systems in one run, interleaved so that drift hits all alike.

tokens/s is generated tokens over the wall time of their batches, prefill included.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path

import torch
from rich.console import Console
from transformers import GenerationConfig

from dspark.engine.engine import EngineConfig
from dspark.engine.policy import Drafting, drafting
from dspark.engine.times import StepTimes
from dspark.eval.identity import Difference, first_difference
from dspark.eval.report import bench_table, print_report
from dspark.eval.setting import Setting
from dspark.models.layers import has_bf16_products
from dspark.models.loader import Target
from dspark.models.source import load_transformers
from dspark.sampling import SamplingParams

SYSTEMS = ("transformers", "plain", "ngram", "mtp", "dspark")
DRAFTERS = {"plain": "none", "ngram": "ngram", "mtp": "mtp"}  # dspark: the one the user names


@dataclass(frozen=True)
class BenchConfig(Setting):
    """What to compare, under which load. policy: of the system `dspark`."""

    drafter: str = "dspark"
    policy: str | None = None
    profile: Path | None = None  # costs to decide by, in place of those kept
    streams: tuple[int, ...] = (1, 8)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    systems: tuple[str, ...] = ("transformers", "plain", "ngram", "dspark")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [s for s in self.systems if s not in SYSTEMS]
        if unknown or not self.systems:
            raise ValueError(f"--systems takes {', '.join(SYSTEMS)}; not '{', '.join(unknown)}'")


Taken = dict[str, float]  # what one batch took on one system, see `run_batch` and `EngineSystem.run`


def figures(batches: list[Taken]) -> dict:
    """Measured columns of a result row; None where there is nothing to divide by."""

    def ratio(a: str, b: str, digits: int) -> float | None:
        above, below = (sum(batch.get(name, 0) for batch in batches) for name in (a, b))
        return round(above / below, digits) if below else None

    return {
        "tokens_per_s": ratio("tokens", "seconds", 2),
        "accepted_length": ratio("committed", "rounds", 3),
        "ms_per_round": ratio("step_ms", "steps", 2),
        "draft_share": ratio("draft_ms", "step_ms", 4),
    }


class EngineSystem:
    """Our engine with one drafter, or none."""

    def __init__(self, target: Target, parts: Drafting, max_streams: int):
        self.policy = parts.policy
        self.engine = parts.engine(target, EngineConfig(max_streams=max_streams, seed=0))

    def run(self, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], Taken]:
        """Answers, their rounds, what those committed, and where the time of steps went."""
        times = self.engine.times = StepTimes()
        sequences = [self.engine.add(ids, params) for ids in prompts]
        while self.engine.has_work:
            self.engine.step()
        taken = {
            "rounds": sum(s.rounds for s in sequences),
            "committed": sum(s.rounds + s.accepted_tokens for s in sequences),
            "steps": times.rounds,
            "step_ms": 1e3 * times.total,
            "draft_ms": 1e3 * times.draft,
        }
        return [s.output_ids for s in sequences], taken


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
        self.model.generation_config = GenerationConfig()  # not the folder's penalties and filters
        self.eos_ids = sorted(target.eos_ids)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], Taken]:
        """Answers; nothing is known of rounds."""
        pad, longest = next(iter(self.eos_ids), 0), max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(x)) + x for x in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=self.model.device)
        sampled = {"do_sample": True, "temperature": params.temperature, "top_k": 0}
        out = self.model.generate(  # pyright: ignore
            ids,
            attention_mask=mask,
            max_new_tokens=params.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self.eos_ids or None,
            **({"do_sample": False} if params.greedy else sampled),
        )
        return [self.trim(row[longest:].tolist()) for row in out], {}

    def trim(self, tokens: list[int]) -> list[int]:
        """Up to and including the first end token; what follows is padding."""
        ends = [i for i, t in enumerate(tokens) if t in self.eos_ids]
        return tokens[: ends[0] + 1] if ends else tokens


System = EngineSystem | TransformersSystem


def make_system(name: str, config: BenchConfig, target: Target) -> System:
    """Build one system and warm it up, so that no first-call cost is timed."""
    if name == "transformers":
        system = TransformersSystem(target)
    else:
        policy = config.policy if name == "dspark" else None
        parts = drafting(target, DRAFTERS.get(name, config.drafter), policy, profile=config.profile)
        system = EngineSystem(target, parts, max(config.streams))
    system.run([[1, 2, 3, 4]], SamplingParams(max_new_tokens=4, ignore_eos=True))
    return system


@dataclass
class BenchResult:
    """Rows for the table, answers by (system, temperature, streams), prompts as token ids."""

    rows: list[dict]
    answers: dict[tuple[str, float, int], list[list[int]]]
    prompts: list[list[int]]


def run_bench(config: BenchConfig, target: Target, on_batch: Callable[[str], None] = lambda _: None) -> BenchResult:
    """Time all systems; on_batch(text) before each batch. Raises ValueError for prompts that do not fit."""
    prompts = config.load_prompts()
    result = BenchResult([], {}, config.encode_prompts(prompts, target))
    systems = {name: make_system(name, config, target) for name in config.systems}
    names = list(systems)
    for streams, temperature in product(config.streams, config.temperatures):
        params = SamplingParams(temperature=temperature, max_new_tokens=config.max_new_tokens)
        # By domain of the prompts; "" if there are several: time belongs to none of them then.
        batches: dict[str, dict[str, list[Taken]]] = {name: defaultdict(list) for name in names}
        answers: dict[str, list[list[int]]] = {name: [] for name in names}
        starts = range(0, len(prompts), streams)
        for number, start in enumerate(starts):
            part = slice(start, start + streams)
            first = number % len(names)  # another one each time: none always runs on a machine another one has heated
            for name in names[first:] + names[:first]:
                on_batch(f"{streams} streams, temperature {temperature:g}: batch {number + 1}/{len(starts)} {name}")
                outputs, taken = run_batch(systems[name], result.prompts[part], params)
                answers[name] += outputs
                domains = {p.domain for p in prompts[part]}
                batches[name][domains.pop() if len(domains) == 1 else ""].append(taken)
        for name, system in systems.items():
            load = {"system": name, "policy": system.policy, "temperature": temperature, "streams": streams}
            by_domain = {domain: figures(of_it) for domain, of_it in sorted(batches[name].items()) if domain}
            result.rows.append(load | figures(list(chain(*batches[name].values()))) | {"by_domain": by_domain})
            result.answers[name, temperature, streams] = answers[name]
    return result


def run_batch(system: System, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], Taken]:
    """Answers of one batch on one system, and what it took."""
    started = time.perf_counter()
    outputs, taken = system.run(prompts, params)
    return outputs, taken | {"tokens": sum(map(len, outputs)), "seconds": time.perf_counter() - started}


def compare(result: BenchResult, target: Target, streams: int) -> tuple[str, list[Difference]]:
    """Greedy DSpark against greedy plain decoding on all prompts: ("n/n", differences)."""
    plain, fast = (result.answers[name, 0.0, streams] for name in ("plain", "dspark"))
    found = [first_difference(target.decoder, *row) for row in zip(result.prompts, plain, fast, strict=True)]
    differences = [d for d in found if d is not None]
    return f"{len(plain) - len(differences)}/{len(plain)}", differences


def check_identity(config: BenchConfig, target: Target, result: BenchResult) -> tuple[dict[str, str], list[dict]]:
    """`compare` in both dtypes: shares by dtype, and all differences. What `result` does not hold is run now."""
    streams = max(config.streams)
    shares, differences = {}, []
    for dtype in ("fp32", "bf16"):
        model, measured, profile = target, result, config.profile
        if dtype != config.dtype:
            model, profile = replace(config, dtype=dtype).load_target(), None  # it belongs to one number format
        if model is not target or not {("plain", 0.0, streams), ("dspark", 0.0, streams)} <= result.answers.keys():
            only = {"streams": (streams,), "temperatures": (0.0,), "systems": ("plain", "dspark")}
            measured = run_bench(replace(config, dtype=dtype, profile=profile, **only), model)
        shares[dtype], found = compare(measured, model, streams)
        differences += [{"dtype": dtype, **asdict(d)} for d in found]
    return shares, differences


def run_and_report(config: BenchConfig, show_table: bool) -> None:
    """The whole command: measure, check identity in both dtypes, print a table and the JSON line."""
    config.load_prompts()  # complain before the model is loaded
    target = config.load_target()
    identical, differences = {}, []
    with Console(stderr=True).status("loading") as status:
        result = run_bench(config, target, status.update)
        if "dspark" in config.systems:
            status.update("greedy identity in fp32 and bf16")
            identical, differences = check_identity(config, target, result)
    notes = [f"greedy output identical to plain decoding, {dtype}: {share}" for dtype, share in identical.items()]
    notes += [f"  {d}" for d in differences]
    report = {"rows": result.rows, "identical_greedy": identical, "differences": differences}
    print_report(report, show_table, bench_table(result.rows), *notes)
