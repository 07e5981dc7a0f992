"""Unpacks a GGUF file once into a Hugging Face folder in the cache, weights dequantised to fp32.

Parsing a GGUF vocabulary takes many seconds, a safetensors file is mapped at once: so it is done once.
"""

import hashlib
import re
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dspark.models.download import cache_folder

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
    tensors = dict(
        converted(t.name, torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float(), config)
        for t in GGUFReader(path).tensors
    )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def converted(name: str, tensor: Tensor, config) -> tuple[str, Tensor]:
    """Hugging Face name and layout of a GGUF tensor; llama.cpp's interleaved rotary order is undone."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], tensor.contiguous()
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ValueError(f"tensor '{name}' is not part of a Llama model")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(match[2])
    if heads is not None:
        rows, columns = tensor.shape
        tensor = tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight", tensor.contiguous()
