"""Where a model's files are: every way to name a model ends in a local Hugging Face folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspark.models.download import SMOLLM2_135M, fetch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # never pickles


@dataclass(frozen=True)
class ModelSource:
    """A model by the name the user gave and the folder that holds its config, tokenizer and safetensors."""

    name: str
    folder: Path


def resolve_model(name: str) -> ModelSource:
    """`smollm2-135m`, a Hugging Face folder, a GGUF file, or a hub name -> local files.

    Raises ValueError with one sentence if there is no such model or its files are unusable.
    """
    path = Path(name)
    if name == DEFAULT_MODEL:
        from dspark.models.gguf import unpack_gguf

        return ModelSource(name, unpack_gguf(fetch(SMOLLM2_135M)))
    if path.is_file():
        from dspark.models.gguf import unpack_gguf

        return ModelSource(name, unpack_gguf(path))
    if path.is_dir():
        return ModelSource(name, path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise ValueError(f"there is no model '{name}': give {DEFAULT_MODEL}, a folder, a GGUF file or a hub name")
    from huggingface_hub import snapshot_download

    try:
        return ModelSource(name, Path(snapshot_download(name, allow_patterns=HUB_FILES)))
    except Exception as error:  # the hub client has many error classes, all mean the same here
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"'{name}' is no local path and could not be fetched from the hub: {reason}") from None


def load_hf_config(source: ModelSource) -> "PretrainedConfig":
    """The Transformers config. Raises ValueError if `config.json` is missing, broken or of an unknown type."""
    from transformers import AutoConfig

    path = source.folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{source.folder}' is not a model folder: it has no config.json")
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.from_pretrained(source.folder)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from None


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """The tokenizer. Raises ValueError if its files are missing or broken."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise ValueError(f"the tokenizer in '{source.folder}' cannot be read: {str(error).splitlines()[0]}") from None


def load_state_dict(source: ModelSource) -> dict[str, Tensor]:
    """All weights by Hugging Face name, in the files' dtype. Raises ValueError for missing or damaged files."""
    files = sorted(source.folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{source.folder}' holds no .safetensors file; convert the weights to safetensors first")
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"'{index}' is not a valid safetensors index") from None
        files = [source.folder / Path(name).name for name in named]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"'{file}' cannot be read, it is missing, damaged or cut short: {error}") from None
    return tensors


def load_transformers(source: ModelSource, dtype: torch.dtype) -> "PreTrainedModel":
    """The same model in Transformers, the baseline that benchmarks compare with."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval()
