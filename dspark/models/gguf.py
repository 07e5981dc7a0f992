"""Unpacks a GGUF file once into a Hugging Face folder in the cache, weights dequantised to fp32.

Parsing a GGUF vocabulary takes many seconds, a safetensors file is mapped at once: so it is done once.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dspark.models.download import cache_folder


def unpack_gguf(path: Path) -> Path:
    """Folder with config, tokenizer and safetensors of a GGUF file; made on first use, then reused.

    Raises ValueError if the file is damaged or of a family other than Llama.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{path.stem}-{key}"
    if folder.is_dir():
        return folder
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"'{path}' is not a GGUF file: give one, or a folder with config.json and safetensors")
    print(f"unpacking {path.name} (once) ...", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=folder.parent) as parent:
        temporary = Path(parent) / "model"
        try:
            write_folder(path, temporary)
        except Exception as error:  # the readers raise whatever the damaged bytes lead them to
            raise ValueError(
                f"'{path}' cannot be unpacked into '{folder.parent}', "
                f"it is damaged, cut short or not a plain Llama model: {error}"
            ) from None
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    return folder


def write_folder(path: Path, folder: Path) -> None:
    """Convert a GGUF file into a new Hugging Face folder. Raises all kinds of errors for a damaged file."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type != "llama":
        raise ValueError(f"its family is '{config.model_type}'")
    if hasattr(config, "quantization_config"):  # the weights written below are not quantised
        delattr(config, "quantization_config")
    tensors, names = {}, hf_names(config.num_hidden_layers)
    for t in GGUFReader(path).tensors:
        if t.name not in names:
            raise ValueError(f"tensor '{t.name}' is not part of a Llama model")
        values = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float()
        tensors[names[t.name]] = converted(names[t.name], values, config)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def hf_names(num_layers: int) -> dict[str, str]:
    """Hugging Face name of every tensor that a GGUF file of a Llama model may hold, by its name there."""
    known = get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "o")] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return {str(known.get_name(name, (".weight",))): name for name in names}


def converted(name: str, tensor: Tensor, config) -> Tensor:
    """A tensor, by its Hugging Face name, in that layout: llama.cpp's interleaved rotary order is undone."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is not None:
        rows, columns = tensor.shape
        tensor = tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    return tensor.contiguous()
