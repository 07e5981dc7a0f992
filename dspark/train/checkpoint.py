"""A training run on disk: a readable record, and all state needed to continue, on any number of processes.

`resume-STEP-EVALUATIONS/` holds fp32 weights and optimiser moments as safetensors shards, each process its own, and
`progress.json`. The folder gets its name when all is written, so that a kill leaves the state before or the new one.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dspark.config import parse_json, write_json
from dspark.train import parallel

if TYPE_CHECKING:
    from dspark.train.trainer import Trainer

PROGRESS_FILE = "progress.json"
STATES = "resume-[0-9]*"


@dataclass
class Progress:
    """Where a run stands; saved with the checkpoint, so that a resumed run continues the same schedule."""

    step: int = 0
    seconds: float = 0.0
    slots: int = 0  # supervised block slots seen
    history: list[dict] = field(default_factory=list)
    share_evaluated: float = 0.0  # of the budget, at the last evaluation


def last_state(folder: Path) -> Path | None:
    """The newest whole state of a run, if there is one."""
    return max(folder.glob(STATES), default=None)


def save_training(trainer: "Trainer", folder: Path) -> None:
    """Write the state and `training.json`, each atomically; nothing before the first step.

    Raises OSError if the disk refuses it; the state before is then untouched.
    """
    progress = trainer.progress
    if not progress.step:
        return
    whole = folder / f"resume-{progress.step:08}-{len(progress.history):04}"
    partial = folder / "resume.tmp"
    first = parallel.rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    tensors = {name: t.contiguous() for name, t in training_state(trainer)[0].items()}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except CheckpointException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(None, f"cannot write the checkpoint ({reason(error)})", str(partial)) from None
    if not first:
        return
    files = {path.name: path.stat().st_size for path in partial.iterdir()}
    record = {"progress": asdict(progress), "identity": trainer.identity, "files": files}
    write_json(record, partial / PROGRESS_FILE)
    if whole.exists():  # nothing has changed since
        shutil.rmtree(partial)
    else:
        partial.rename(whole)
    for state in set(folder.glob(STATES)) - {whole}:
        shutil.rmtree(state)
    record = {"config": asdict(trainer.config), "progress": asdict(progress), "data": trainer.identity["data"]}
    write_json(record, folder / "training.json")


def reason(error: CheckpointException) -> str:
    """The last line of what the first process that failed says."""
    return str(next(iter(error.failures.values()))[0]).strip().splitlines()[-1]


def training_state(trainer: "Trainer") -> tuple[dict[str, Tensor], dict, dict]:
    """(tensors, model, optimizer): all tensors that a step changes, by name, and the state dicts that hold the same.

    Each process has the shards of its own.
    """
    model, optimizer = get_state_dict(trainer.model, trainer.optimizers)
    tensors = {f"model.{name}": t for name, t in model.items()}
    for name, state in cast(dict, optimizer["state"]).items():
        tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
    return cast(dict[str, Tensor], tensors), model, optimizer


def resume_training(trainer: "Trainer", state: Path) -> None:
    """Put a trainer of the same configuration and data where `state` was saved.

    Raises ValueError if it is damaged or of another configuration or other data.
    """

    def refusal(why: str) -> ValueError:
        return ValueError(f"cannot resume from '{state}': {why}; choose another --out or remove the folder")

    record = parse_json(state / PROGRESS_FILE)
    try:
        progress, identity = Progress(**record["progress"]), dict(record["identity"])
        damaged = [n for n, size in record["files"].items() if (state / n).stat().st_size != size]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise refusal(str(error)) from None
    if damaged:
        raise refusal(f"{', '.join(damaged)} was not written by this run or is damaged")
    if other := "; ".join(differences(identity, json.loads(json.dumps(trainer.identity)))):
        raise ValueError(
            f"cannot resume from '{state}', it is of another run: {other}. Give the same options and data to continue "
            f"it, or another --out, with --initial '{state.parent}' to start from its drafter"
        )
    tensors, model, optimizer = training_state(trainer)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(state)))
    except CheckpointException as error:
        raise refusal(reason(error)) from None
    set_state_dict(trainer.model, trainer.optimizers, model_state_dict=model, optim_state_dict=optimizer)
    trainer.progress = progress
    trainer.bind_draft_vocabulary()


def differences(saved: dict, ours: dict) -> Iterator[str]:
    """A phrase for each setting that is not the same."""
    for part, settings in ours.items():
        for name, value in settings.items():
            before = saved.get(part, {}).get(name)
            if before != value:
                yield f"{part} {name} was {before} and is now {value}"
