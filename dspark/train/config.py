"""How a drafter is trained: every setting with its default, and the losses of the kinds of drafters."""

import math
from dataclasses import dataclass
from typing import Literal

from dspark.drafters.layers import DraftModel
from dspark.drafters.model import DSparkConfig
from dspark.train.loss import LossWeights
from dspark.train.parallel import ParallelKind

DSPARK_LOSS = LossWeights(distillation=1.0)  # the paper's three terms and a fourth for short runs
DFLASH_LOSS = LossWeights(cross_entropy=1.0, total_variation=0.0, confidence=0.0)
CHAIN_LOSS = LossWeights(cross_entropy=0.0, total_variation=0.0, confidence=0.0, distillation=1.0)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minutes` of training time are the budget and the schedule follows them; or `epochs`, if given.

    By epochs the weights depend on data and seed alone, by minutes on the speed of the machine too.
    `evaluations` are spread evenly over the budget and take time of their own; the best one's drafter is kept.
    """

    minutes: float = 60.0
    epochs: float | None = None
    learning_rate: float = 6e-4
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers; slower steps that bring more
    head_learning_rate_scale: float = 5.0  # the Markov head starts from zero and must reach logits of several units
    warmup_share: float = 0.04
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    sequences_per_step: int = 1
    sequences_at_once: int = 4  # of a step, in memory together; gradients of the others are added to theirs
    anchors_per_sequence: int = 256
    compile: bool = False  # by torch.compile: a minute at first, then faster; a resumed run may round otherwise
    parallel: ParallelKind = "ddp"  # how several processes share the work
    cache_gib: float = 6.0  # memory for the target's features
    feature_cache: str | None = None  # a folder for them on disk instead
    feature_cache_gib: float = 50.0
    evaluations: int = 8
    decode_every: int = 4  # evaluations; such a one, and the last, really decodes too
    save_every_minutes: float = 5.0
    seed: int = 0
    loss: LossWeights | None = None  # None: what `default_loss` says

    def __post_init__(self) -> None:
        positive = {"learning_rate": 1.0, "max_grad_norm": math.inf, "minutes": math.inf, "epochs": math.inf}
        positive |= {"save_every_minutes": math.inf, "feature_cache_gib": math.inf}
        for name, most in positive.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < most:
                raise ValueError(f"{name} must be above 0 and below {most:g}, not {value}")
        for name, most in {"warmup_share": 1.0, "weight_decay": 1.0, "cache_gib": math.inf}.items():
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must be at least 0 and below {most:g}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"the seed of a training run must lie in 0..{2**31 - 1}, not {self.seed}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"the optimizer is adamw or muon, not '{self.optimizer}'")
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compiling around FSDP's hooks takes many minutes; use --parallel ddp, or no --compile")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("Muon needs whole matrices and FSDP shares them out; use --parallel ddp, or adamw")
        for name in ("sequences_per_step", "sequences_at_once", "anchors_per_sequence", "evaluations", "decode_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


# What a resumed run may change: none of it moves a weight, but for the rounding of sums.
FREE = (
    "sequences_at_once",
    "compile",
    "parallel",
    "cache_gib",
    "feature_cache",
    "feature_cache_gib",
    "evaluations",
    "decode_every",
    "save_every_minutes",
)


def default_loss(model: DraftModel) -> LossWeights:
    """Of DSpark, of DFlash where it has no sequential head, or of drafters that draft token by token."""
    if not isinstance(model.config, DSparkConfig):
        return CHAIN_LOSS
    return DSPARK_LOSS if model.config.markov_rank else DFLASH_LOSS
