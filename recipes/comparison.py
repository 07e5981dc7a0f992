"""Drafters compared at equal data and equal training time, all started from the target's late layers.

dspark data --prompts train.jsonl --out runs/answers.jsonl
export OMP_NUM_THREADS=1
for name in dspark dspark-ours dflash dflash-deep eagle3 mtp; do python recipes/comparison.py $name; done
for block in 4 8 12 16; do for name in dspark rnn dflash; do python recipes/comparison.py $name-$block; done; done
for head in vanilla rnn none; do for b in 4 8 12 16; do python recipes/comparison.py head-$head-$b 10; done; done
dspark eval --prompts dev.jsonl --drafter runs/comparison/dspark --drafter runs/comparison/dflash ... --plot slots.png

The second argument is minutes. `dspark` is the paper's; `dspark-ours` has the feature input and the copy head besides.
What starts from the target's layers does not get to know late slots in minutes: `head-...` starts from the backbone of
the shipped drafter instead, all alike, with a fresh sequential head (vanilla, rnn) or none, which is DFlash.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from dspark.drafters.checkpoint import load_drafter, save_drafter
from dspark.drafters.model import DSparkModel
from dspark.train.config import TrainConfig
from dspark.train.run import TrainRun, train
from dspark.train.setup import COPY_LENGTH, DrafterRecipe

DSPARK = DrafterRecipe(
    tap_layers=(7, 17, 29, 27), source_layers=(28, 29), mask_token_id=0, block_size=4, markov_rank=96
)
RECIPES = {
    "dspark": DSPARK,
    "dspark-ours": replace(DSPARK, feature_input=True, copy_length=COPY_LENGTH),
    "rnn": replace(DSPARK, markov_head="rnn"),
    "dflash": replace(DSPARK, markov_rank=0),
    "dflash-deep": replace(DSPARK, markov_rank=0, source_layers=(25, 26, 27, 28, 29)),
    "eagle3": replace(DSPARK, kind="eagle3", source_layers=(28,)),
    "mtp": replace(DSPARK, kind="mtp", tap_layers=(29,), source_layers=(29,), block_size=1),
}
# As the paper's Figure 4: what longer blocks bring.
RECIPES |= {
    f"{name}-{block}": replace(RECIPES[name], block_size=block)
    for name in ("dspark", "dspark-ours", "rnn", "dflash", "eagle3")
    for block in (4, 8, 12, 16)
}
SHIPPED = Path("checkpoints/smollm2-135m")


def headless_start(head: str) -> Path:
    """The shipped drafter without what its heads learned: a fresh `head`, W1 alone as it was, or "none"."""
    shipped, folder = load_drafter(SHIPPED), Path("runs/comparison") / f"start-{head}"
    rank, kind = (0, "vanilla") if head == "none" else (shipped.config.markov_rank, head)
    shape = {"markov_rank": rank, "markov_head": kind, "confidence_head": rank > 0, "copy_length": 0}
    torch.manual_seed(0)
    model = DSparkModel(replace(shipped.config, **shape))
    own = model.state_dict()
    kept = {name: weight for name, weight in shipped.state_dict().items() if name in own}
    fresh = {"confidence_head.proj.weight", "confidence_head.proj.bias", "markov_head.markov_w2.weight"}
    for name in kept.keys() & fresh:
        kept[name] = torch.zeros_like(kept[name])
    model.load_state_dict({**own, **kept})
    save_drafter(model, folder)
    return folder


def head_compared(name: str, minutes: float = 10.0) -> TrainRun:
    """This head and block size, as in "head-vanilla-8", trained on from the shipped drafter's backbone."""
    _, head, block = name.split("-")
    return TrainRun(
        data=(Path("runs/answers.jsonl"),),
        out=Path("runs/comparison") / name,
        initial=headless_start(head),
        block_size=int(block),
        max_length=448,
        heldout=32,
        train=TrainConfig(
            minutes=minutes,
            learning_rate=4e-4,
            sequences_per_step=4,
            anchors_per_sequence=64,
            feature_cache="runs/features-7-17-29-27",
            evaluations=1,
        ),
    )


def compared(name: str, minutes: float = 6.0) -> TrainRun:
    """One of RECIPES; those with the same taps share their features on disk."""
    recipe = RECIPES[name]
    return TrainRun(
        data=(Path("runs/answers.jsonl"),),
        out=Path("runs/comparison") / name,
        drafter=recipe,
        max_length=448,
        heldout=32,
        train=TrainConfig(
            minutes=minutes,
            learning_rate=8e-4,
            sequences_per_step=2,
            feature_cache=f"runs/features-{'-'.join(map(str, recipe.tap_layers))}",
            evaluations=1,
        ),
    )


if __name__ == "__main__":
    run = head_compared if sys.argv[1].startswith("head-") else compared
    train(run(sys.argv[1], *map(float, sys.argv[2:])))
