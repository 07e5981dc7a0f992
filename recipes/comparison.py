"""Drafters compared at equal data and equal training time, all started from the target's late layers.

dspark data --prompts train.jsonl --out runs/answers.jsonl
export OMP_NUM_THREADS=1
for name in dspark dspark-ours dflash dflash-deep eagle3 mtp; do python recipes/comparison.py $name; done
for block in 4 8 12 16; do for name in dspark rnn dflash; do python recipes/comparison.py $name-$block; done; done
dspark eval --prompts dev.jsonl --drafter runs/comparison/dspark --drafter runs/comparison/dflash ... --plot slots.png

The second argument is minutes. `dspark` is the paper's; `dspark-ours` has the feature input and the copy head besides.
"""

import sys
from dataclasses import replace
from pathlib import Path

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
    train(compared(sys.argv[1], *map(float, sys.argv[2:])))
