"""The drafter for SmolLM2-135M-Instruct.

`dspark` gives in ten minutes what `longer` goes on from. The shipped one had both, in one thread on a core of its own,
by the seconds of its processor time, on the target's own answers: 4,083 of them, then 6,582 (1.59 M tokens), written at
temperatures 0, 0.2 (top-p 0.9), 0.7 (top-p 0.95) and 1, about a third of the prompts self-written. It had rank 128; its
Markov head was cut to 96 by singular values and trained for six minutes more, to stay below 32 MB. Here it is 96 from
the start.

dspark data --prompts train.jsonl --out runs/answers.jsonl
dspark data --self-written 2000 --out runs/self-written.jsonl
OMP_NUM_THREADS=1 python recipes/smollm2_135m.py dspark
OMP_NUM_THREADS=1 python recipes/smollm2_135m.py longer
"""

import sys
from pathlib import Path

from dspark.train.config import TrainConfig
from dspark.train.run import TrainRun, train
from dspark.train.setup import DrafterRecipe

DATA = (Path("runs/answers.jsonl"), Path("runs/self-written.jsonl"))


def dspark() -> TrainRun:
    """Two draft layers from the target's last two, block 4, blocks that start from the target's features."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-first"),
        drafter=DrafterRecipe(
            tap_layers=(7, 17, 29, 27),
            source_layers=(28, 29),
            mask_token_id=0,
            block_size=4,
            markov_rank=96,
            draft_vocab_size=8_192,
            feature_input=True,
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


if __name__ == "__main__":
    train({f.__name__: f for f in (dspark, longer)}[sys.argv[1]]())
