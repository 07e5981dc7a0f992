"""The drafter for SmolLM2-135M-Instruct.

`first` makes one from the target in ten minutes; `refresh` goes on from a drafter, by default the shipped one, on
answers that it has not seen, and `mean` keeps a part of the drafter that it started from. The shipped one is older than
`first` and had several runs like `refresh`, some with shorter blocks, then `refresh` itself three times and `mean`:
docs/results.md has the settings and curves of each.

dspark data --prompts train.jsonl --out runs/answers.jsonl
dspark data --self-written 2000 --out runs/self-written.jsonl
OMP_NUM_THREADS=1 python recipes/smollm2_135m.py first
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/smollm2_135m.py refresh runs/smollm2-135m-first
python recipes/smollm2_135m.py mean 0.75 runs/smollm2-135m-first
"""

import sys
from pathlib import Path

from dspark.drafters.checkpoint import load_drafter, save_drafter
from dspark.train.config import TrainConfig
from dspark.train.loss import LossWeights
from dspark.train.run import TrainRun, train
from dspark.train.setup import COPY_LENGTH, DrafterRecipe

DATA = (Path("runs/answers.jsonl"), Path("runs/self-written.jsonl"))


def first() -> TrainRun:
    """Two draft layers from the target's last two, block 8, feature input and copy head."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-first"),
        drafter=DrafterRecipe(
            tap_layers=(7, 17, 29, 27),
            source_layers=(28, 29),
            mask_token_id=0,
            block_size=8,
            markov_rank=96,
            draft_vocab_size=8_192,
            feature_input=True,
            copy_length=COPY_LENGTH,
        ),
        max_length=448,
        heldout=48,
        train=TrainConfig(
            minutes=10, learning_rate=8e-4, sequences_per_step=2, feature_cache="runs/features", evaluations=3
        ),
    )


def refresh(initial: str = "checkpoints/smollm2-135m") -> TrainRun:
    """Further from a drafter, with Muon and a loss nearer to acceptance; half of the answers at temperature 1."""
    return TrainRun(
        data=DATA,
        out=Path("runs/smollm2-135m-fresh"),
        initial=Path(initial),
        max_length=448,
        heldout=48,
        train=TrainConfig(
            minutes=50,
            learning_rate=6e-4,
            optimizer="muon",
            sequences_per_step=12,
            anchors_per_sequence=128,  # of some 200: more prompts an hour, which is what is short
            compile=True,
            feature_cache="runs/features",
            evaluations=4,
            loss=LossWeights(distillation=0.1),
            seed=51,
        ),
    )


def mean(share: str, initial: str = "checkpoints/smollm2-135m") -> None:
    """A drafter and what `refresh` made of it, weighing `share`: each is better at what it learnt from."""
    before, after = load_drafter(Path(initial)), load_drafter(Path("runs/smollm2-135m-fresh"))
    weights = after.state_dict()
    merged = {
        name: t.lerp(weights[name], float(share)) for name, t in before.state_dict().items() if t.is_floating_point()
    }
    after.load_state_dict(weights | merged)
    save_drafter(after, Path("runs/smollm2-135m-mean"))


if __name__ == "__main__":
    name, *options = sys.argv[1:]
    if name == "mean":
        mean(*options)
    else:
        train({"first": first, "refresh": refresh}[name](*options))
