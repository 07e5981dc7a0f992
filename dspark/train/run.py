"""One training run from files to checkpoint, with a progress bar; Ctrl-C and SIGTERM leave a state to resume from.

In several processes: `torchrun --nproc-per-node 2 -m dspark.cli train ...`; files must be in reach of all of them.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.layers import check_fit
from dspark.engine.rounds import MACRO_AVERAGE
from dspark.models.decoder import Decoder
from dspark.models.loader import Target, load_target
from dspark.models.source import load_state_dict
from dspark.train import parallel
from dspark.train.checkpoint import last_state, resume_training
from dspark.train.config import TrainConfig
from dspark.train.data import Example, mix, read_examples, split_by_prompt
from dspark.train.evaluate import decoded_acceptance
from dspark.train.output import only_writer
from dspark.train.scalars import Scalars
from dspark.train.setup import DrafterRecipe, default_recipe, mask_token, new_drafter, with_block_size
from dspark.train.trainer import StepResult, Trainer

SMOOTHING = 0.05  # weight of the newest step in the figures beside the progress bar


@dataclass(frozen=True)
class TrainRun:
    """All that a training run depends on.

    `initial` continues from a trained drafter and keeps its shape, but for a `block_size` that is given; otherwise
    `drafter` is the shape: a recipe, or a name in `setup.DRAFTERS` of which the fields up to `official` make one (see
    `default_recipe`).
    """

    data: tuple[Path, ...]
    out: Path
    model: str = "smollm2-135m"
    dtype: str = "bf16"
    device: str = "cpu"
    initial: Path | None = None  # a drafter checkpoint to start from instead of the target's layers
    drafter: DrafterRecipe | str | None = None  # None: "dspark"
    block_size: int | None = None
    draft_vocab_size: int | None = None
    draft_layers: int | None = None
    markov_head: Literal["vanilla", "gated", "rnn"] | None = None
    window: int = 0
    official: bool = False
    max_length: int = 512  # tokens of an example, prompt included
    weights: tuple[float, ...] = ()  # the files' shares of an epoch; none: every example once
    heldout: int = 24  # examples kept for evaluation: whole prompts, chosen by hash
    tensorboard: Path | None = None  # folder for its event files
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"examples of {self.max_length} tokens train nothing; give a larger --max-length")
        shape = ("drafter", "draft_vocab_size", "draft_layers", "markov_head", "window", "official")
        given = [f"--{name.replace('_', '-')}" for name in shape if getattr(self, name)]
        if self.initial is not None and given:
            raise ValueError(f"a drafter that --initial continues from keeps its shape: leave out {', '.join(given)}")


@contextmanager
def stop_signals() -> Iterator[Event]:
    """Set by Ctrl-C and SIGTERM, which end a run after its step; even where a shell started it with them ignored."""
    received = Event()
    previous = {s: signal.signal(s, lambda *_: received.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(run: TrainRun) -> bool:
    """Train, or continue what `run.out` holds; True if the budget was used up, False after Ctrl-C or SIGTERM.

    Raises ValueError for data or a checkpoint that cannot be used.
    """
    if run.out.exists() and not run.out.is_dir():
        raise ValueError(f"'{run.out}' is no folder: --out is one to make, or that of a run to continue")
    if (run.out / "config.json").exists() and last_state(run.out) is None:
        raise ValueError(f"'{run.out}' holds a finished drafter, not a run to resume; choose another --out")
    with parallel.processes(run.device) as device:
        with only_writer(run.out, "dspark train") if parallel.rank() == 0 else nullcontext():
            return run_to_end(replace(run, device=device))


def run_to_end(run: TrainRun) -> bool:
    """Load, resume if there is something to, train, and show on stderr how it goes; see `train`."""
    target = load_target(run.model, run.dtype, run.device)
    trainer = make_trainer(run, target)
    console = Console(stderr=True, quiet=parallel.rank() > 0)
    if (state := last_state(run.out)) is not None:
        resume_training(trainer, state)
        console.print(f"resuming '{run.out}' at step {trainer.progress.step}")
    scalars = Scalars(run.tensorboard, trainer.progress.step) if run.tensorboard and parallel.rank() == 0 else None
    loss, length = None, 1.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, stop_signals() as stopped:
        task = progress.add_task("training", total=1.0)

        def on_step(result: StepResult) -> None:
            nonlocal loss, length
            weight = 1.0 if loss is None else SMOOTHING
            loss = (1 - weight) * (loss or 0.0) + weight * result.loss
            length = (1 - weight) * length + weight * result.accepted_length
            text = f"loss {loss:.3f}  expected accepted length {length:.2f}"
            progress.update(task, completed=trainer.share_done, description=text)
            if scalars is not None:
                scalars.step(trainer.progress.step, result, trainer.learning_rate())

        def on_evaluation(entry: dict) -> None:
            lengths = {"expected": entry["heldout_accepted_length"]}
            for row in entry.get("decoded", []):
                if row["domain"] == MACRO_AVERAGE:
                    lengths[f"decoded at temperature {row['temperature']:g}"] = row["accepted_length"]
            text = ", ".join(f"{value:.2f} {name}" for name, value in lengths.items())
            speed = entry["slots"] / max(entry["seconds"], 1e-9)
            progress.print(
                f"step {entry['step']} ({speed:,.0f} slots/s), held out: loss {entry['heldout_loss']:.3f}, "
                f"accepted length {text}"
            )
            if scalars is not None:
                scalars.evaluation(entry)

        finished = trainer.run(run.out, on_step, stopped.is_set, on_evaluation)
    if not finished:
        console.print(f"interrupted; the same command continues from '{run.out}'")
    return finished


def make_trainer(run: TrainRun, target: Target) -> Trainer:
    """A fresh trainer: data read and split, drafter initialised from the target or from `run.initial`.

    Raises ValueError for data that cannot be used and for an initial drafter that does not fit the target.
    """
    decoder = target.decoder
    heldout, examples = read_all(run, decoder)
    if run.initial is not None:
        model = load_drafter(run.initial)
        check_fit(model.config, decoder.config)
        if run.block_size is not None:
            model = with_block_size(model, run.block_size)
    else:
        recipe = run.drafter or "dspark"
        if isinstance(recipe, str):
            shape = (run.block_size, run.draft_layers, run.markov_head, run.window, run.official, run.draft_vocab_size)
            recipe = default_recipe(decoder, mask_token(target.tokenizer), recipe, *shape)
        model = new_drafter(decoder, load_state_dict(target.source), recipe, examples, run.train.seed)
    decode = partial(decoded_acceptance, target, heldout=heldout)
    return Trainer(model, decoder, examples, heldout, run.train, decode)


def read_all(run: TrainRun, decoder: Decoder) -> tuple[list[Example], list[Example]]:
    """(held-out examples, those of an epoch). Raises ValueError if there are too few."""
    longest = min(run.max_length, decoder.config.max_position_embeddings)
    files = [read_examples(path, decoder.config.vocab_size, longest) for path in run.data]
    heldout, files = split_by_prompt(files, run.heldout)
    examples = mix(files, run.weights) if run.weights else [e for examples in files for e in examples]
    if not examples:
        raise ValueError(f"no prompt is left to train on with {run.heldout} examples held out; write more answers")
    return heldout, examples
