"""From a drafter's name on the command line to a drafter bound to its target."""

from pathlib import Path

from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.interface import Drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.models.decoder import Decoder

# In a wheel the shipped checkpoints lie inside the package, in a checkout beside it.
PACKAGE = Path(__file__).parents[1]
CHECKPOINTS = PACKAGE / "checkpoints" if (PACKAGE / "checkpoints").is_dir() else PACKAGE.parent / "checkpoints"


def make_drafter(name: str, model: str, target: Decoder) -> Drafter | None:
    """name: `none`, `ngram`, `dspark` (the one shipped for the model) or a checkpoint folder.

    Raises ValueError if there is no such drafter or it does not fit the target.
    """
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter()
    folder = CHECKPOINTS / model if name == "dspark" else Path(name)
    if not folder.is_dir():
        if name == "dspark":
            raise ValueError(f"no drafter is shipped for '{model}'; train one with 'dspark train' and pass its folder")
        raise ValueError(f"'{name}' is no drafter: give none, ngram, dspark or a checkpoint folder")
    return DSparkDrafter(load_drafter(folder), target)
