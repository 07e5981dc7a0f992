"""The drafter for SmolLM2-135M-Instruct.

The shipped one had 42 minutes of `dspark` on 806 answers, 51 of `continued` on 1,243 (271k tokens), 33 of
`on_policy` on 2,383 (510k tokens, 338 of the prompts written by the target itself), 47 of `wider` on 4,135 (984k
tokens, 1,340 of the prompts self-written) and 42 of `longer`, in one thread, on 6,582 (1.59 M tokens), each from
where the one before ended. `wider` ran as two processes of one thread:

dspark data --prompts train.jsonl --out runs/answers.jsonl
dspark data --self-written 2000 --out runs/self-written.jsonl
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/smollm2_135m.py wider
"""

import sys
from pathlib import Path

from dspark.train.config import TrainConfig
from dspark.train.run import TrainRun, train
from dspark.train.setup import DrafterRecipe


def dspark() -> TrainRun:
    """Two draft layers from the target's last two, block 4; features of 440k tokens take 2.6 GB of the cache."""
    return TrainRun(
        data=(Path("runs/answers.jsonl"), Path("runs/self-written.jsonl")),
        out=Path("runs/smollm2-135m"),
        drafter=DrafterRecipe(
            tap_layers=(7, 17, 29, 27),
            source_layers=(28, 29),
            mask_token_id=0,
            block_size=4,
            markov_rank=128,
            draft_vocab_size=8_192,
        ),
        max_length=448,
        train=TrainConfig(minutes=60, sequences_per_step=1),
    )


def continued() -> TrainRun:
    """On from a trained drafter, with a schedule of its own: what its first minutes lose the last ones regain."""
    return TrainRun(
        data=(Path("runs/answers.jsonl"),),
        out=Path("runs/smollm2-135m-continued"),
        initial=Path("runs/smollm2-135m"),
        max_length=448,
        train=TrainConfig(minutes=51, learning_rate=5e-4, cache_gib=9.0),
    )


def on_policy() -> TrainRun:
    """On again, with more of the target's own answers and with prompts that it wrote itself."""
    return TrainRun(
        data=(Path("runs/answers.jsonl"), Path("runs/more-answers.jsonl"), Path("runs/self-written.jsonl")),
        out=Path("runs/smollm2-135m-on-policy"),
        initial=Path("runs/smollm2-135m-continued"),
        max_length=448,
        train=TrainConfig(minutes=33, learning_rate=5e-4, cache_gib=9.0),
    )


def wider() -> TrainRun:
    """On again, mostly with answers to other prompts, at four sampling settings (0, 0.2/0.9, 0.7/0.95, 1)."""
    return TrainRun(
        data=(Path("runs/answers.jsonl"), Path("runs/self-written.jsonl")),
        out=Path("runs/smollm2-135m-wider"),
        initial=Path("runs/smollm2-135m-on-policy"),
        max_length=448,
        heldout=32,
        train=TrainConfig(minutes=47, learning_rate=8e-4, sequences_per_step=4, cache_gib=7.0, evaluations=6, seed=4),
    )


def longer() -> TrainRun:
    """On again with two thirds more answers, half of the new ones to prompts that the target wrote itself."""
    return TrainRun(
        data=(Path("runs/answers.jsonl"), Path("runs/more-answers.jsonl"), Path("runs/self-written.jsonl")),
        out=Path("runs/smollm2-135m-longer"),
        initial=Path("runs/smollm2-135m-wider"),
        max_length=448,
        heldout=32,
        train=TrainConfig(
            minutes=42,
            learning_rate=7e-4,
            sequences_per_step=4,
            feature_cache="runs/features",
            evaluations=6,
            seed=5,
        ),
    )


if __name__ == "__main__":
    train({f.__name__: f for f in (dspark, continued, on_policy, wider, longer)}[sys.argv[1]]())
