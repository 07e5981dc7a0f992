"""The drafter for SmolLM2-135M-Instruct.

The shipped one had 42 minutes of `dspark` on 806 answers, 51 minutes of `continued` on 1,243 (271k tokens), then 33
minutes of `on_policy` on 2,383 (510k tokens, 338 of the prompts written by the target itself).

dspark data --prompts train.jsonl --out runs/answers.jsonl
dspark data --self-written 2000 --out runs/self-written.jsonl
python recipes/smollm2_135m.py
"""

from pathlib import Path

from dspark.train.run import TrainRun, train
from dspark.train.setup import DrafterRecipe
from dspark.train.trainer import TrainConfig


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


if __name__ == "__main__":
    train(dspark())
