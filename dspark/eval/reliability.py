"""How far confidence can be trusted: rounds collected from live decoding, temperatures fitted, before and after.

Shapes: N rounds, G slots of a block.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from dspark.config import write_json
from dspark.drafters.interface import Drafter
from dspark.drafters.load import CALIBRATION_FILE, drafter_folder, make_drafter
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.llm import encode_prompt
from dspark.eval.machine import provenance
from dspark.eval.plots import reliability_diagram
from dspark.eval.report import reliability_table
from dspark.eval.tasks import load_prompts
from dspark.models.loader import Target, load_target
from dspark.sampling import SamplingParams
from dspark.spec.calibration import (
    Calibration,
    brier,
    expected_calibration_error,
    fit_temperatures,
    reliability_bins,
    roc_auc,
)
from dspark.spec.prefix_scheduler import FixedLength


@dataclass
class Rounds:
    """Confidence logits [N, G] of rounds whose whole block was verified, and how many tokens stayed [N]."""

    logits: Tensor
    accepted: Tensor


@dataclass
class RoundRecorder:
    """Stands where the engine keeps its calibration, passes confidence through and writes down what came of it."""

    logits: list[Tensor] = field(default_factory=list)
    accepted: list[Tensor] = field(default_factory=list)

    def confidence(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def observe(self, logits: Tensor, verify_lengths: Tensor, accepted: Tensor) -> None:
        whole = verify_lengths == logits.shape[1]  # the last rounds of an answer verify less
        self.logits.append(logits[whole].float().cpu())
        self.accepted.append(accepted[whole].cpu())

    def rounds(self) -> Rounds:
        return Rounds(torch.cat(self.logits), torch.cat(self.accepted))


def collect_rounds(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    streams: int,
    on_finish: Callable[[], None] = lambda: None,
) -> Rounds:
    """Decode all prompts at all temperatures, every draft token verified. Raises ValueError if no round was whole."""
    recorder = RoundRecorder()
    engine = Engine(
        target.decoder,
        drafter,
        FixedLength(drafter.block_size),
        eos_ids=target.eos_ids,
        config=EngineConfig(max_streams=streams, seed=0),
        calibration=recorder,
    )
    for temperature in temperatures:
        for prompt in prompts:
            engine.add(prompt, SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens))
    while engine.has_work:
        for new in engine.step():
            if new.sequence.finish_reason is not None:
                on_finish()
    rounds = recorder.rounds() if recorder.logits else Rounds(torch.empty(0, 0), torch.empty(0))
    if not len(rounds.accepted):
        raise ValueError("no whole block was drafted; use more prompts or more new tokens")
    return rounds


def reliability(rounds: Rounds, calibration: Calibration) -> dict:
    """By position: ECE, ROC-AUC and Brier score of "the prefix up to here survives", and bins for the diagram."""
    predicted = calibration.confidence(rounds.logits).cumprod(-1)
    result: dict[str, list] = {"ece": [], "roc_auc": [], "brier": [], "bins": [], "survival": []}
    for k in range(predicted.shape[1]):
        outcome = rounds.accepted > k
        result["survival"].append(outcome.double().mean().item())
        result["ece"].append(expected_calibration_error(predicted[:, k], outcome))
        result["roc_auc"].append(roc_auc(predicted[:, k], outcome))
        result["brier"].append(brier(predicted[:, k], outcome))
        result["bins"].append([b for b in reliability_bins(predicted[:, k], outcome) if b.samples])
    return result


def calibrate(fitting: Rounds, measuring: Rounds, dataset: str) -> tuple[Calibration, dict, dict]:
    """Temperatures from `fitting`; reliability on `measuring` before and after."""
    identity = Calibration.identity(fitting.logits.shape[1])
    before = reliability(measuring, identity)
    temperatures = fit_temperatures(fitting.logits, fitting.accepted)
    fitted = Calibration(
        temperatures=tuple(float(t) for t in temperatures),
        dataset=dataset,
        num_samples=len(fitting.accepted),
        ece_before=tuple(before["ece"]),
        ece_after=(),
    )
    after = reliability(measuring, fitted)
    return (
        Calibration(fitted.temperatures, dataset, fitted.num_samples, fitted.ece_before, tuple(after["ece"])),
        before,
        after,
    )


@dataclass(frozen=True)
class CalibrateConfig:
    """Which drafter to calibrate, on which prompts; every third prompt is kept for measuring."""

    model: str = "smollm2-135m"
    drafter: str = "dspark"
    dtype: str = "bf16"
    device: str = "cpu"
    prompts: Path | None = None
    limit: int | None = None
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 128
    streams: int = 16
    out: Path | None = None  # None: beside the checkpoint
    plot: Path | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError("--temperatures must be numbers of at least 0")


def run_and_report(config: CalibrateConfig, show_table: bool) -> None:
    """The whole command: decode, fit, write the side file, print reliability before and after and the JSON line.

    Raises ValueError for a drafter without a checkpoint and for too few prompts.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    folder = drafter_folder(config.drafter, config.model)
    if folder is None:
        raise ValueError(f"'{config.drafter}' has no confidence to calibrate; give dspark or a checkpoint folder")
    prompts = load_prompts(config.prompts, config.limit)
    if len(prompts) < 3:
        raise ValueError(f"{len(prompts)} prompts are too few: every third is kept for measuring")
    target = load_target(config.model, config.dtype, config.device)
    ids = [encode_prompt(target.tokenizer, p.turns[0]) for p in prompts]
    random.Random(0).shuffle(ids)  # prompts come round and round from the domains: every third would be of one
    parts = {"fitting": [p for i, p in enumerate(ids) if i % 3 != 2], "measuring": ids[2::3]}
    rounds = {}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, part in parts.items():
            task = progress.add_task(f"answers for {name}", total=len(part) * len(config.temperatures))
            drafter = make_drafter(config.drafter, config.model, target.decoder)
            if drafter is None or not drafter.has_confidence:
                raise ValueError(f"'{config.drafter}' has no confidence head to calibrate")
            rounds[name] = collect_rounds(
                target,
                drafter,
                part,
                config.temperatures,
                config.max_new_tokens,
                config.streams,
                lambda task=task: progress.advance(task),
            )
    dataset = f"{config.prompts.name if config.prompts else 'own prompts'}, temperatures {config.temperatures}"
    calibration, before, after = calibrate(rounds["fitting"], rounds["measuring"], dataset)
    write_json(calibration, config.out or folder / CALIBRATION_FILE)
    if config.plot is not None:
        reliability_diagram(before["bins"], after["bins"], config.plot)
    if show_table:
        Console().print(reliability_table(calibration, before, after))
    report = {
        "temperatures": calibration.temperatures,
        "rounds": {name: len(r.accepted) for name, r in rounds.items()},
        "before": before,
        "after": after,
        "mean_ece": {"before": mean(before["ece"]), "after": mean(after["ece"])},
        "out": str(config.out or folder / CALIBRATION_FILE),
    }
    print(json.dumps({**report, **provenance()}))
