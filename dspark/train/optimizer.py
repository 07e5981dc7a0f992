"""What a step does to the weights: an optimiser for each kind of them, and their moving average."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

OptimizerName = Literal["adamw", "muon"]


def make_optimizers(model: nn.Module, name: OptimizerName, weight_decay: float, head_scale: float) -> list[Optimizer]:
    """AdamW for all weights, or Muon for the matrices of the draft layers and AdamW for the rest.

    Each group's `scale` multiplies the learning rate; head_scale is that of the Markov head.
    """
    groups = {"matrices": [], "head": [], "rest": []}
    for path, parameter in model.named_parameters():
        matrix = name == "muon" and path.startswith("layers.") and parameter.ndim == 2
        groups["matrices" if matrix else "head" if path.startswith("markov_head.") else "rest"].append(parameter)
    optimizers: list[Optimizer] = [
        AdamW(
            [{"params": groups["rest"], "scale": 1.0}, {"params": groups["head"], "scale": head_scale}],
            lr=0.0,
            weight_decay=weight_decay,
            betas=(0.9, 0.95),
            fused=True,  # one pass over the weights: 21 % of a step became 1 %
        )
    ]
    if groups["matrices"]:
        # Updates of the size of AdamW's, so that the same learning rate and schedule serve both.
        of_matrices = [{"params": groups["matrices"], "scale": 1.0}]
        optimizers.append(Muon(of_matrices, 0.0, weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class WeightAverage:
    """Exponential moving average of a model's weights; the first ones are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = list(model.parameters())
        self.values = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        """After step number `step`, from 1."""
        decay = min(self.decay, step / (step + 9))
        get_ema_multi_avg_fn(decay)(self.values, self.parameters, None)  # pyright: ignore

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model's weights are the average."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)
