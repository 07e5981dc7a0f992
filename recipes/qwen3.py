"""Drafters for Qwen3-4B, 8B and 14B with the settings of the official implementation. Not run by us: no GPU here.

dspark data --model Qwen/Qwen3-4B --prompts prompts.jsonl --out runs/qwen3-answers.jsonl --max-new-tokens 3072
python recipes/qwen3.py 4B runs/qwen3-answers.jsonl
"""

import sys
from pathlib import Path

from dspark.train.config import TrainConfig
from dspark.train.loss import LossWeights
from dspark.train.run import TrainRun, train
from dspark.train.setup import DrafterRecipe

TAP_LAYERS = {"4B": (1, 9, 17, 25, 33), "8B": (1, 9, 17, 25, 33), "14B": (1, 10, 19, 28, 37)}
NUM_LAYERS = {"4B": 36, "8B": 36, "14B": 40}


def dspark(size: str, *data: Path, device: str = "cuda") -> TrainRun:
    """Five draft layers, block 7, the whole vocabulary, ten epochs of 512 sequences a step, 512 anchors each."""
    last = NUM_LAYERS[size]
    return TrainRun(
        data=data,
        out=Path(f"runs/qwen3-{size.lower()}"),
        model=f"Qwen/Qwen3-{size}",
        device=device,
        drafter=DrafterRecipe(
            tap_layers=TAP_LAYERS[size],
            source_layers=tuple(range(last - 5, last)),
            mask_token_id=151_669,
            block_size=7,
            markov_rank=256,
            draft_vocab_size=151_936,
        ),
        max_length=4096,
        train=TrainConfig(
            epochs=10,
            learning_rate=6e-4,
            head_learning_rate_scale=1.0,
            warmup_share=0.04,
            sequences_per_step=512,
            sequences_at_once=1,
            anchors_per_sequence=512,
            loss=LossWeights(),
        ),
    )


if __name__ == "__main__":
    train(dspark(sys.argv[1], *map(Path, sys.argv[2:])))
