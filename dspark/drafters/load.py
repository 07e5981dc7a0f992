"""From a drafter's name on the command line to a drafter bound to its target."""

from pathlib import Path

from dspark.config import read_json
from dspark.drafters.bound import BoundDrafter
from dspark.drafters.chain import ChainDrafter
from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.interface import Drafter
from dspark.drafters.layers import DraftModel
from dspark.drafters.model import DSparkModel
from dspark.drafters.ngram import NgramDrafter
from dspark.models.decoder import Decoder
from dspark.spec.calibration import Calibration

# In a wheel the shipped checkpoints lie inside the package, in a checkout beside it.
PACKAGE = Path(__file__).resolve().parents[1]
CHECKPOINTS = PACKAGE / "checkpoints" if (PACKAGE / "checkpoints").is_dir() else PACKAGE.parent / "checkpoints"

SHIPPED = {"dspark": "{}", "mtp": "{}-mtp"}  # by name: the checkpoint of a model
CALIBRATION_FILE = "calibration.json"


def drafter_folder(name: str, model: str) -> Path | None:
    """The checkpoint that `name` means for `model`; None for drafters that have none.

    Raises ValueError if there is no such checkpoint.
    """
    if name in ("none", "ngram"):
        return None
    if name in SHIPPED:
        folder = (CHECKPOINTS / SHIPPED[name].format(model)).resolve()
        if folder.parent != CHECKPOINTS or not folder.is_dir():  # a model's path leads anywhere
            raise ValueError(
                f"no {name} drafter is shipped for '{model}'; train one with 'dspark train' and pass its folder"
            )
        return folder
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"'{name}' is no drafter: give none, ngram, {', '.join(SHIPPED)} or a checkpoint folder")
    return folder


def make_drafter(name: str, model: str, target: Decoder) -> Drafter | None:
    """name: `none`, `ngram`, `dspark` or `mtp` (shipped for the model), or a checkpoint folder.

    Raises ValueError if there is no such drafter or it does not fit the target.
    """
    folder = drafter_folder(name, model)
    if folder is None:
        return NgramDrafter() if name == "ngram" else None
    return bind(load_drafter(folder), target)


def bind(model: DraftModel, target: Decoder) -> BoundDrafter:
    """The drafter that serves what was trained. Raises ValueError if it does not fit the target."""
    return DSparkDrafter(model, target) if isinstance(model, DSparkModel) else ChainDrafter(model, target)  # pyright: ignore


def load_calibration(name: str, model: str) -> Calibration | None:
    """The side file of the drafter's checkpoint, if there is one. Raises ValueError if it is damaged."""
    folder = drafter_folder(name, model)
    path = folder / CALIBRATION_FILE if folder is not None else None
    return read_json(Calibration, path) if path is not None and path.exists() else None
