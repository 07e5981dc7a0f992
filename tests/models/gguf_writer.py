"""Tiny Llama models on disk, made in a moment: a Hugging Face folder, and a GGUF file as llama.cpp would write it."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dspark.models.gguf import hf_names

MERGED, SPECIAL = "ab", ["<|start|>", "<|end|>", "<|pad|>"]


def tiny_llama(tie_embeddings: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=259,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
    """The matrices are stored as `kind`, norms as F32, rows of q and k in llama.cpp's interleaved rotary order."""
    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads or c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_to_unicode().values(), MERGED, *SPECIAL])
    writer.add_token_types([1] * 257 + [3] * 3)  # 1: normal, 3: control
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(259)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")
    names = {hf: gguf for gguf, hf in hf_names(c.num_hidden_layers).items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        array = (interleave(tensor, heads) if heads else tensor).numpy()
        stored = kind if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(names[name], quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k: pairs (i, i + D/2) of each head's rows become neighbours."""
    rows, columns = weight.shape
    halves = weight.numpy().reshape(heads, 2, rows // heads // 2, columns)
    return torch.from_numpy(np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns)))
