"""How far confidence can be trusted: rounds collected from live decoding, temperatures fitted, before and after."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from dspark.config import write_json
from dspark.drafters.load import CALIBRATION_FILE, drafter_folder, make_drafter
from dspark.engine.llm import encode_prompt
from dspark.engine.rounds import Rounds, collect_rounds
from dspark.eval.machine import provenance
from dspark.eval.plots import reliability_diagram
from dspark.eval.report import reliability_table
from dspark.eval.tasks import load_prompts
from dspark.models.loader import load_target
from dspark.spec.calibration import (
    Calibration,
    brier,
    expected_calibration_error,
    fit,
    fit_weights,
    reliability_bins,
    roc_auc,
    weighed,
)


def reliability(rounds: Rounds, calibration: Calibration) -> dict:
    """By position: ECE, ROC-AUC and Brier score of "the prefix up to here survives", and bins for the diagram."""
    predicted = calibration.confidence(rounds.signals).cumprod(-1)
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
    """Weights, temperatures and shifts from `fitting`; reliability on `measuring` before and after."""
    identity = Calibration.identity(fitting.signals.shape[1])
    before = reliability(measuring, identity)
    weights = fit_weights(fitting.signals, fitting.accepted)
    temperatures, shifts = fit(weighed(fitting.signals, weights), fitting.accepted)
    fitted = Calibration(
        temperatures, dataset, len(fitting.accepted), tuple(before["ece"]), shifts=shifts, weights=weights
    )
    after = reliability(measuring, fitted)
    return replace(fitted, ece_after=tuple(after["ece"])), before, after


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


def run(config: CalibrateConfig) -> tuple[Calibration, dict]:
    """Decode, fit, write the side file -> what it holds, and reliability before and after.

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
    return calibration, {
        "temperatures": calibration.temperatures,
        "shifts": calibration.shifts,
        "weights": calibration.weights,
        "rounds": {name: len(r.accepted) for name, r in rounds.items()},
        "before": before,
        "after": after,
        "mean_ece": {"before": mean(before["ece"]), "after": mean(after["ece"])},
        "out": str(config.out or folder / CALIBRATION_FILE),
    }


def run_and_report(config: CalibrateConfig, show_table: bool) -> None:
    """The whole command: calibrate, print reliability before and after and the JSON line."""
    from rich.console import Console

    calibration, report = run(config)
    if show_table:
        Console().print(reliability_table(calibration, report["before"], report["after"]))
    print(json.dumps({**report, **provenance()}))
