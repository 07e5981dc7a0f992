"""The drafter for SmolLM2-135M-Instruct.

`dspark` gives in ten minutes what `longer` goes on from. The shipped one is older than these defaults: 80 minutes at
block 4 without a copy head, 55 more with block 6 and a copy head, three runs like `whole_blocks`, 72 minutes in two
processes, the last three below, and the last of these again on other answers (docs/results.md has the curves, and what
differed).

dspark data --prompts train.jsonl --out runs/answers.jsonl
dspark data --self-written 2000 --out runs/self-written.jsonl
OMP_NUM_THREADS=1 python recipes/smollm2_135m.py dspark
OMP_NUM_THREADS=1 python recipes/smollm2_135m.py longer
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/smollm2_135m.py short_blocks
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/smollm2_135m.py whole_blocks
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/smollm2_135m.py refresh
"""

import sys
from pathlib import Path

from dspark.train.config import TrainConfig
from dspark.train.loss import LossWeights
from dspark.train.run import TrainRun, train
from dspark.train.setup import COPY_LENGTH, DrafterRecipe

DATA = (Path("runs/answers.jsonl"), Path("runs/self-written.jsonl"))


def dspark() -> TrainRun:
    """Two draft layers from the target's last two, block 6, feature input and copy head."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-first"),
        drafter=DrafterRecipe(
            tap_layers=(7, 17, 29, 27),
            source_layers=(28, 29),
            mask_token_id=0,
            block_size=6,
            markov_rank=96,
            draft_vocab_size=8_192,
            feature_input=True,
            copy_length=COPY_LENGTH,
        ),
        max_length=448,
        heldout=32,
        train=TrainConfig(
            minutes=10, learning_rate=8e-4, sequences_per_step=2, feature_cache="runs/features", evaluations=3
        ),
    )


def longer() -> TrainRun:
    """On from there, with a schedule of its own."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m"),
        initial=Path("runs/smollm2-135m-first"),
        max_length=448,
        heldout=32,
        train=TrainConfig(
            minutes=64,
            learning_rate=9e-4,
            sequences_per_step=4,
            compile=True,
            feature_cache="runs/features",
            evaluations=8,
            seed=21,
        ),
    )


def short_blocks() -> TrainRun:
    """From a drafter that is good already: fresh answers, Muon, a loss nearer to acceptance, blocks of half length.

    Such a block costs less than half, and the first slots are what holds the others back. The shipped drafter's run was
    interrupted after the fourth evaluation, 38 minutes, when the learning rate had come down to a quarter.
    """
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-short"),
        initial=Path("checkpoints/smollm2-135m"),
        block_size=4,
        max_length=448,
        heldout=48,
        train=TrainConfig(
            minutes=57,
            learning_rate=7e-4,
            optimizer="muon",
            sequences_per_step=12,
            compile=True,
            feature_cache="runs/features",
            evaluations=6,
            loss=LossWeights(distillation=0.2),
            seed=31,
        ),
    )


def whole_blocks() -> TrainRun:
    """From there, the blocks that are drafted."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-whole"),
        initial=Path("runs/smollm2-135m-short"),
        block_size=8,
        max_length=448,
        heldout=48,
        train=TrainConfig(
            minutes=15,
            learning_rate=2.2e-4,
            optimizer="muon",
            sequences_per_step=8,
            compile=True,
            feature_cache="runs/features",
            evaluations=3,
            loss=LossWeights(distillation=0.1),
            seed=32,
        ),
    )


def refresh() -> TrainRun:
    """The shipped drafter further, on answers that it has not seen, half of them at temperature 1."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-fresh"),
        initial=Path("checkpoints/smollm2-135m"),
        max_length=448,
        heldout=48,
        train=TrainConfig(
            minutes=50,
            learning_rate=6e-4,
            optimizer="muon",
            sequences_per_step=12,
            compile=True,
            feature_cache="runs/features",
            evaluations=4,
            loss=LossWeights(distillation=0.1),
            seed=41,
        ),
    )


if __name__ == "__main__":
    train({f.__name__: f for f in (dspark, longer, short_blocks, whole_blocks, refresh)}[sys.argv[1]]())
