"""Tiny training runs, also as a process of their own that can be killed or started by torchrun.

python -m tests.train.tiny_run FOLDER '{"out": "a", "epochs": 3.0}' ...
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dspark.drafters.checkpoint import save_drafter
from dspark.models.loader import Target
from dspark.train import parallel
from dspark.train.checkpoint import last_state
from dspark.train.config import TrainConfig
from dspark.train.run import TrainRun, train
from dspark.train.trainer import Trainer
from tests.tiny import tiny_model, tiny_target


def write_inputs(folder: Path, **changes) -> None:
    """Eleven examples of two domains and the drafter that all runs in `folder` start from."""
    rows = [
        {"prompt_ids": [1, 2, 3 + i], "answer_ids": [(5 + i * k) % 64 for k in range(5 + i)], "domain": "ab"[i % 2]}
        for i in range(11)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_drafter(tiny_model(tiny_target().config, draft_vocab_size=40, **changes), folder / "initial")


def run_tiny(
    folder: Path, out: str, stop_after: int | None = None, die_in_write: int | None = None, **training
) -> dict:
    """`train` with a tiny target into folder/out -> whether it `finished`, and the `losses` of its steps.

    stop_after: process 1, if there is one, gets SIGTERM after so many steps. die_in_write: SIGKILL halfway through the
    so many-th state.
    """
    losses, writes = [], 0
    plain_step, plain_save = Trainer.step, dcp.save

    def step(self, indices):
        result = plain_step(self, indices)
        losses.append(result.loss)
        if len(losses) == stop_after and parallel.rank() == parallel.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def save(tensors, storage_writer):
        nonlocal writes
        writes += 1
        plain_save(tensors, storage_writer=storage_writer)
        if writes == die_in_write:
            (shard,) = storage_writer.path.iterdir()
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig(**{"epochs": 3.0, "learning_rate": 3e-3, "sequences_per_step": 4, **training})
    run = TrainRun((folder / "answers.jsonl",), folder / out, initial=folder / "initial", heldout=3, train=config)
    target = Target(None, tiny_target(), None, frozenset())  # pyright: ignore
    with (
        patch("dspark.train.run.load_target", lambda *_: target),
        patch("dspark.train.checkpoint.dcp.save", save),
        patch.object(Trainer, "step", step),
    ):
        return {"finished": train(run), "losses": losses}


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of a run that its last state holds, whoever wrote which shard of it."""
    reader = dcp.HuggingFaceStorageReader(str(last_state(folder)))
    described = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in described.items()}  # pyright: ignore
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def state(folder: Path) -> dict:
    """The tensors of a run's last state, and the exported drafter."""
    drafter = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
    return saved_tensors(folder) | {f"exported.{name}": t for name, t in drafter.items()}


if __name__ == "__main__":
    with parallel.processes("cpu"):
        for settings in sys.argv[2:]:
            result = run_tiny(Path(sys.argv[1]), **json.loads(settings))
            if parallel.rank() == 0:
                print(json.dumps(result))
