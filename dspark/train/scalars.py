"""TensorBoard scalars of a training run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark.train.trainer import StepResult


class Scalars:
    """Event files in `folder`; what an earlier run wrote there after `step` is hidden.

    Raises ValueError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs TensorBoard: pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, step: int, result: "StepResult", learning_rate: float) -> None:
        self.writer.add_scalar("train/loss", result.loss, step)
        self.writer.add_scalar("train/expected_accepted_length", result.accepted_length, step)
        self.writer.add_scalar("train/learning_rate", learning_rate, step)

    def evaluation(self, entry: dict) -> None:
        """entry: of the history."""
        values = {"loss": entry["heldout_loss"], "expected_accepted_length": entry["heldout_accepted_length"]}
        for k, value in enumerate(entry["heldout_acceptance_by_slot"]):
            values[f"acceptance_by_slot/{k}"] = value
        for domain, figures in entry["domains"].items():
            values[f"expected_accepted_length/{domain}"] = figures["heldout_accepted_length"]
        for row in entry.get("decoded", []):
            values[f"decoded_accepted_length/{row['domain']}, t={row['temperature']:g}"] = row["accepted_length"]
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"heldout/{name}", value, entry["step"])
        self.writer.flush()
