"""One training run from files to checkpoint, with a progress bar; Ctrl-C leaves a state to resume from."""

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.layers import check_fit
from dspark.models.decoder import Decoder
from dspark.models.loader import Target, load_target
from dspark.models.source import load_state_dict
from dspark.train.checkpoint import RESUME_FILE, resume_training
from dspark.train.data import Example, mix, read_examples, split_by_prompt
from dspark.train.setup import DrafterRecipe, default_recipe, mask_token, new_drafter
from dspark.train.trainer import StepResult, TrainConfig, Trainer

SMOOTHING = 0.05  # weight of the newest step in the figures beside the progress bar


@dataclass(frozen=True)
class TrainRun:
    """All that a training run depends on.

    `initial` continues from a trained drafter and keeps its shape; otherwise `drafter` is the shape: a recipe, or a
    name in `setup.DRAFTERS` of which the fields up to `window` make one (see `default_recipe`).
    """

    data: tuple[Path, ...]
    out: Path
    model: str = "smollm2-135m"
    dtype: str = "bf16"
    device: str = "cpu"
    initial: Path | None = None  # a drafter checkpoint to start from instead of the target's layers
    drafter: DrafterRecipe | str = "dspark"
    block_size: int | None = None
    draft_layers: int | None = None
    markov_head: Literal["vanilla", "gated", "rnn"] | None = None
    window: int = 0
    max_length: int = 512  # tokens of an example, prompt included
    weights: tuple[float, ...] = ()  # the files' shares of an epoch; none: every example once
    heldout: int = 24  # examples kept for evaluation: whole prompts, chosen by hash
    train: TrainConfig = field(default_factory=TrainConfig)


def train(run: TrainRun) -> bool:
    """Train, or continue what `run.out` holds; True if the budget was used up, False after Ctrl-C.

    Raises ValueError for data or a checkpoint that cannot be used.
    """
    target = load_target(run.model, run.dtype, run.device)
    trainer = make_trainer(run, target)
    if (run.out / RESUME_FILE).exists():
        resume_training(trainer, run.out)
        print(f"resuming '{run.out}' at step {trainer.progress.step}", file=sys.stderr)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    previous = signal.signal(signal.SIGINT, stop)  # finish the step, save, then leave
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("training", total=1.0)
            loss, length = None, 1.0

            def on_step(result: StepResult) -> None:
                nonlocal loss, length
                weight = 1.0 if loss is None else SMOOTHING
                loss = (1 - weight) * (loss or 0.0) + weight * result.loss
                length = (1 - weight) * length + weight * result.accepted_length
                text = f"loss {loss:.3f}  expected accepted length {length:.2f}"
                progress.update(task, completed=trainer.share_done, description=text)

            trainer.run(run.out, on_step, lambda: stopped)
    finally:
        signal.signal(signal.SIGINT, previous)
    if stopped:
        print(f"interrupted; the same command continues from '{run.out}'", file=sys.stderr)
    return not stopped


def make_trainer(run: TrainRun, target: Target) -> Trainer:
    """A fresh trainer: data read and split, drafter initialised from the target or from `run.initial`.

    Raises ValueError for data that cannot be used and for an initial drafter that does not fit the target.
    """
    decoder = target.decoder
    heldout, examples = read_all(run, decoder)
    if run.initial is not None:
        model = load_drafter(run.initial)
        check_fit(model.config, decoder.config)
    else:
        recipe = run.drafter
        if isinstance(recipe, str):
            shape = (run.block_size, run.draft_layers, run.markov_head, run.window)
            recipe = default_recipe(decoder, mask_token(target.tokenizer), recipe, *shape)
        model = new_drafter(decoder, load_state_dict(target.source), recipe, examples, run.train.seed)
    return Trainer(model, decoder, examples, heldout, run.train)


def read_all(run: TrainRun, decoder: Decoder) -> tuple[list[Example], list[Example]]:
    """(held-out examples, those of an epoch). Raises ValueError if there are too few."""
    files = [read_examples(path, decoder.config.vocab_size, run.max_length) for path in run.data]
    heldout, files = split_by_prompt(files, run.heldout)
    examples = mix(files, run.weights) if run.weights else [e for examples in files for e in examples]
    if not examples:
        raise ValueError(f"no prompt is left to train on with {run.heldout} examples held out; write more answers")
    return heldout, examples
