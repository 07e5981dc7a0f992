"""How far confidence can be trusted: rounds collected from live decoding, temperatures fitted, before and after."""

import random
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import Progress

from dspark.config import check_output, write_json
from dspark.drafters.load import CALIBRATION_FILE, drafter_folder, make_drafter
from dspark.engine.rounds import Rounds, collect_rounds
from dspark.eval.plots import reliability_diagram
from dspark.eval.report import print_report, reliability_table, sampling_table
from dspark.eval.setting import Setting, check_plot
from dspark.sampling import SamplingParams
from dspark.spec import calibration as scores
from dspark.spec.calibration import Calibration
from dspark.train.work import DataConfig


def reliability(rounds: Rounds, calibration: Calibration) -> dict:
    """By position: ECE, ROC-AUC and Brier score of "the prefix up to here survives", and bins for the diagram."""
    predicted = calibration.confidence(rounds.signals).cumprod(-1)
    accepted = rounds.accepted.numpy()
    positions = [(probability, accepted > k) for k, probability in enumerate(predicted.T)]
    return {
        "ece": [scores.expected_calibration_error(*position) for position in positions],
        "roc_auc": [scores.roc_auc(*position) for position in positions],
        "brier": [scores.brier(*position) for position in positions],
        "bins": [[b for b in scores.reliability_bins(*position) if b.samples] for position in positions],
        "survival": [float(outcome.mean()) for _, outcome in positions],
    }


def calibrate(fitting: Rounds, measuring: Rounds, dataset: str) -> tuple[Calibration, dict, dict]:
    """Weights, temperatures and shifts from `fitting`; reliability on `measuring` before and after."""
    identity = Calibration.identity(fitting.signals.shape[1])
    before = reliability(measuring, identity)
    weights = scores.fit_weights(fitting.signals, fitting.accepted)
    fitted = scores.fit(scores.weighed(fitting.signals, weights), fitting.accepted)
    fitted = replace(fitted, weights=weights, dataset=dataset, num_samples=len(fitting.accepted))
    after = reliability(measuring, fitted)
    return replace(fitted, ece_before=tuple(before["ece"]), ece_after=tuple(after["ece"])), before, after


@dataclass(frozen=True)
class CalibrateConfig(Setting):
    """Which drafter to calibrate, on which prompts and samplings, those that training answers are written with unless
    others are given; every third prompt is kept for measuring.
    """

    drafter: str = "dspark"
    samplings: tuple[tuple[float, float], ...] = DataConfig.samplings  # temperature, top-p
    streams: int = 16
    out: Path | None = None  # None: beside the checkpoint
    plot: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings:
            raise ValueError("give at least one sampling setting")
        if self.out is not None:
            check_output(self.out)
        check_plot(self.plot)

    @property
    def settings(self) -> dict[str, SamplingParams]:
        """By name, as on the command line. Raises ValueError for an impossible one."""
        return {
            f"{t:g}/{p:g}" if p < 1 else f"{t:g}": SamplingParams(t, top_p=p, max_new_tokens=self.max_new_tokens)
            for t, p in self.samplings
        }


def run(config: CalibrateConfig) -> dict:
    """Decode, fit, write the side file -> what it holds, and reliability before and after.

    Raises ValueError for a drafter without a checkpoint and for too few prompts.
    """
    folder = drafter_folder(config.drafter, config.model)
    if folder is None:
        raise ValueError(f"'{config.drafter}' has no confidence to calibrate; give dspark or a checkpoint folder")
    prompts = config.load_prompts()
    if len(prompts) < 3:
        raise ValueError(f"{len(prompts)} prompts are too few: every third is kept for measuring")
    target = config.load_target()
    drafter = make_drafter(config.drafter, config.model, target.decoder)
    if drafter is None or not drafter.has_confidence:
        raise ValueError(f"'{config.drafter}' has no confidence head to calibrate")
    ids = config.encode_prompts(prompts, target)
    random.Random(0).shuffle(ids)  # prompts come round and round from the domains: every third would be of one
    parts = {"fitting": [p for i, p in enumerate(ids) if i % 3 != 2], "measuring": ids[2::3]}
    by_sampling: dict[str, dict[str, Rounds]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, part in parts.items():
            task = progress.add_task(f"answers for {name}", total=len(part) * len(config.settings))
            advance = partial(progress.advance, task)
            by_sampling[name] = {
                sampling: collect_rounds(target, drafter, part, params, config.streams, advance)
                for sampling, params in config.settings.items()
            }
    rounds = {name: Rounds.together(of_part.values()) for name, of_part in by_sampling.items()}
    dataset = f"{config.prompts.name if config.prompts else 'own prompts'}, samplings {','.join(config.settings)}"
    calibration, before, after = calibrate(rounds["fitting"], rounds["measuring"], dataset)
    out = config.out or folder / CALIBRATION_FILE
    write_json(calibration, out)
    return {
        **asdict(calibration),
        "rounds": {name: len(r.accepted) for name, r in rounds.items()},
        "before": before,
        "after": after,
        "after_by_sampling": {
            sampling: {name: values for name, values in reliability(of_it, calibration).items() if name != "bins"}
            for sampling, of_it in by_sampling["measuring"].items()
        },
        "mean_ece": {"before": mean(before["ece"]), "after": mean(after["ece"])},
        "out": str(out),
    }


def run_and_report(config: CalibrateConfig, show_table: bool) -> None:
    """The whole command: calibrate, print reliability before and after and the JSON line, draw the diagram."""
    report = run(config)
    print_report(report, show_table, reliability_table(report), sampling_table(report))
    if config.plot is not None:
        reliability_diagram(report["before"], report["after"], config.plot)
