"""A training run on disk: a readable record, and all state needed to continue, on any number of processes.

`resume.safetensors` holds fp32 weights, optimiser moments and progress in one file, so that a kill at any
moment leaves either the old state or the new one.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dspark.config import write_json
from dspark.drafters.checkpoint import save_tensors
from dspark.train import parallel
from dspark.train.parallel import WHOLE

if TYPE_CHECKING:
    from dspark.train.trainer import Trainer

RESUME_FILE = "resume.safetensors"


@dataclass
class Progress:
    """Where a run stands; saved with the checkpoint, so that a resumed run continues the same schedule."""

    step: int = 0
    seconds: float = 0.0
    slots: int = 0  # supervised block slots seen
    history: list[dict] = field(default_factory=list)


def save_training(trainer: "Trainer", folder: Path) -> None:
    """Write `resume.safetensors` and `training.json`, each atomically; nothing before the first step."""
    if not trainer.progress.step:
        return
    tensors = training_state(trainer)
    if parallel.rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    progress = asdict(trainer.progress)
    metadata = {"progress": json.dumps(progress), "identity": json.dumps(trainer.identity)}
    save_tensors({name: t.contiguous() for name, t in tensors.items()}, folder / RESUME_FILE, metadata)
    record = {"config": asdict(trainer.config), "progress": progress, "data": trainer.identity["data"]}
    write_json(record, folder / "training.json")


def training_state(trainer: "Trainer") -> dict[str, Tensor]:
    """All tensors that a step changes, whole, in process 0."""
    model, optimizer = get_state_dict(trainer.model, trainer.optimizers, options=WHOLE)
    tensors = {f"model.{name}": t for name, t in model.items()}
    for name, state in cast(dict, optimizer.get("state", {})).items():
        tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
    return cast(dict[str, Tensor], tensors)


def resume_training(trainer: "Trainer", folder: Path) -> None:
    """Put a trainer of the same configuration and data where the saved run stopped.

    Raises ValueError if the file is missing, damaged or of another configuration or other data.
    """
    path = folder / RESUME_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress, identity = Progress(**json.loads(metadata["progress"])), dict(json.loads(metadata["identity"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot resume from '{path}': {reason}; choose another --out or remove the folder") from None
    if other := "; ".join(differences(identity, json.loads(json.dumps(trainer.identity)))):
        raise ValueError(
            f"cannot resume from '{path}', it is of another run: {other}. Give the same options and data to continue "
            f"it, or another --out, with --initial '{folder}' to start from its drafter"
        )

    def part(prefix: str) -> dict:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    expected = {name: t.shape for name, t in trainer.model.state_dict().items()}
    if {name: t.shape for name, t in part("model.").items()} != expected:
        raise ValueError(f"cannot resume from '{path}': it lacks weights of this drafter; remove the folder")
    set_model_state_dict(trainer.model, part("model."), options=WHOLE)
    state: dict = defaultdict(dict)
    for name, t in part("optimizer.").items():
        weight, _, key = name.rpartition(".")
        state[weight][key] = t
    moments = get_optimizer_state_dict(trainer.model, trainer.optimizers)
    moments["state"] = state  # pyright: ignore
    set_optimizer_state_dict(trainer.model, trainer.optimizers, moments, options=WHOLE)
    trainer.progress = progress
    trainer.bind_draft_vocabulary()


def differences(saved: dict, ours: dict) -> Iterator[str]:
    """A phrase for each setting that is not the same."""
    for part, settings in ours.items():
        for name, value in settings.items():
            before = saved.get(part, {}).get(name)
            if before != value:
                yield f"{part} {name} was {before} and is now {value}"
