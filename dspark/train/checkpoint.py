"""A training run on disk: the drafter itself, a readable record, and all state needed to continue.

`resume.safetensors` holds fp32 weights, optimiser moments and progress in one file, so that a kill at any
moment leaves either the old state or the new one.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from dspark.drafters.checkpoint import save_drafter, save_tensors

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
    """Write the drafter, `training.json` and `resume.safetensors`, each atomically."""
    save_drafter(trainer.model, folder)
    tensors = {f"model.{name}": t for name, t in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    record = {
        "config": asdict(trainer.config),
        "progress": asdict(trainer.progress),
        "data": trainer.describe_data(),
    }
    tensors = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    save_tensors(tensors, folder / RESUME_FILE, {"progress": json.dumps(record["progress"])})
    temporary = folder / "training.json.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(folder / "training.json")


def resume_training(trainer: "Trainer", folder: Path) -> None:
    """Put a trainer of the same configuration where the saved run stopped.

    Raises ValueError if the file is missing, damaged or of a drafter of another shape.
    """
    path = folder / RESUME_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = Progress(**json.loads(metadata["progress"]))
        trainer.model.load_state_dict(
            {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        )
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot resume from '{path}': {reason}; choose another --out or remove the folder") from None
    trainer.progress = progress
    trainer.bind_draft_vocabulary()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            state = {k: tensors.get(f"optimizer.{name}.{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in state.values()):
                trainer.optimizer.state[parameter] = state
