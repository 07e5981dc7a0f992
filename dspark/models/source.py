"""Where a model's files are: every way to name a model ends in a local Hugging Face folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark.models.download import SMOLLM2_135M, fetch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    path = Path(name).expanduser()
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

    with errors_as(f"'{name}' is no local path and could not be fetched from the hub"):
        return ModelSource(name, Path(snapshot_download(name, allow_patterns=HUB_FILES)))


def load_hf_config(source: ModelSource) -> "PretrainedConfig":
    """The Transformers config.

    Raises ValueError if `config.json` is missing, broken, of an unknown type or of a quantised model.
    """
    from transformers import AutoConfig

    path = source.folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{source.folder}' is not a model folder: it has no config.json")
    with errors_as(f"'{path}' cannot be read"):
        json.loads(path.read_text(encoding="utf-8"))  # its message says where, Transformers' does not
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"'{source.folder}' holds quantised weights; give the unquantised model or a GGUF file")
    return config


def load_generation_config(source: ModelSource) -> "GenerationConfig":
    """What the model's makers generate with, Transformers' defaults if they do not say. Raises ValueError if broken."""
    from transformers import GenerationConfig

    if not (path := source.folder / "generation_config.json").is_file():
        return GenerationConfig()
    with errors_as(f"'{path}' cannot be read"):
        return GenerationConfig.from_pretrained(source.folder)


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """The tokenizer. Raises ValueError if its files are missing or broken."""
    from transformers import AutoTokenizer

    with errors_as(f"the tokenizer in '{source.folder}' cannot be read"):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)


def load_state_dict(source: ModelSource) -> dict[str, Tensor]:
    """All weights by Hugging Face name, in the files' dtype. Raises ValueError for missing or damaged files."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source.folder):
        with errors_as(f"'{file}' cannot be read, it is missing, damaged or cut short"):
            tensors |= load_file(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, or the one file. Raises ValueError if there are none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"'{folder}' holds no model.safetensors; convert the weights to safetensors first")
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]  # never a file outside the folder
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"'{index}' is not a valid safetensors index") from None


def load_transformers(source: ModelSource, dtype: torch.dtype) -> "PreTrainedModel":
    """The same model in Transformers, the baseline that benchmarks compare with. Raises ValueError for bad files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = load_hf_config(source)
    with errors_as(f"Transformers cannot load '{source.folder}'"):
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    return model.eval()


@contextmanager
def errors_as(what: str) -> Iterator[None]:
    """Raise ValueError with that and the first line of any error: other libraries have many kinds, files' values of the
    wrong type lead to all of them, and below the first line are advice and tracebacks."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {lines[0]}") from None
