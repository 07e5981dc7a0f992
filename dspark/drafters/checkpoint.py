"""Drafter checkpoints: a folder with `config.json` and `model.safetensors` (bf16). No pickles.

Folders in the format of the official implementation are read too, see `official.py`.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.config import from_dict, parse_json, write_json
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Model
from dspark.drafters.layers import DrafterConfig, DraftModel
from dspark.drafters.model import DSparkConfig, DSparkModel
from dspark.drafters.mtp import MtpConfig, MtpModel
from dspark.drafters.official import config_to_official, drafter_tensors, official_tensors, official_to_config

MODELS: dict[type[DrafterConfig], type[DraftModel]] = {
    DSparkConfig: DSparkModel,
    Eagle3Config: Eagle3Model,
    MtpConfig: MtpModel,
}
CONFIGS = {config.kind: config for config in MODELS}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises OSError if the disk refuses it; the old file is then untouched."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(None, f"cannot write the checkpoint ({error})", str(path)) from None
    temporary.replace(path)


def save_drafter(model: DraftModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write atomically: a reader sees the old files or the new ones, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: t.detach().cpu().to(dtype if t.is_floating_point() else torch.int32).contiguous()
        for name, t in model.state_dict().items()
    }
    save_tensors(tensors, folder / "model.safetensors")
    write_json({"kind": model.config.kind} | asdict(model.config), folder / "config.json")


def write_official(
    model: DraftModel, embedding: Tensor, lm_head: Tensor, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter for the big engines; embedding and lm_head [V, C] are those of its target.

    Raises ValueError for what the format cannot say and OSError if the disk refuses.
    """
    if not isinstance(model, DSparkModel):
        raise ValueError(f"the official format is for DSpark and DFlash, not for {model.config.kind}")
    tensors = official_tensors(model, embedding, lm_head, dtype)
    config = config_to_official(model.config, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(config, folder / "config.json")


def read_config(path: Path) -> tuple[DrafterConfig, bool]:
    """A drafter's config and whether it is of the official format. Raises ValueError naming the file."""
    data, where = parse_json(path), f"'{path}'"
    if not isinstance(data, dict) or "architectures" not in data:
        # Folders written before there was more than one kind name none.
        kind = data.pop("kind", DSparkConfig.kind) if isinstance(data, dict) else DSparkConfig.kind
        if kind not in list(CONFIGS):
            raise ValueError(f"{where}: a drafter is of kind {', '.join(CONFIGS)}, not '{kind}'")
        return from_dict(CONFIGS[kind], data, where), False
    try:
        return official_to_config(data), True
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{where}: {error}") from None


def load_drafter(folder: Path) -> DraftModel:
    """The model in fp32, from either format. Raises ValueError for missing, damaged or mismatched files."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' is not a drafter checkpoint: it has no config.json")
    config, official = read_config(folder / "config.json")
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{weights}' cannot be read, it is missing or damaged: {error}") from None
    model = MODELS[type(config)](config)
    if official:
        tensors = drafter_tensors(tensors, config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"'{weights}' does not fit its config.json: {reason}") from None
    d2t, vocab_size = model.d2t, config.decoder.vocab_size
    if d2t.min() < 0 or d2t.max() >= vocab_size or len(d2t.unique()) < len(d2t):
        raise ValueError(f"'{weights}': d2t must hold distinct token ids in 0..{vocab_size - 1}")
    return model
