"""The target: a lean decoder that exposes the outputs of chosen layers (taps) for every token.

It computes on flattened tokens [N, ...]; which token belongs to which request is known to the
`Attention` object that the caller passes, and to nothing else here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.models import cpu_ops
from dspark.models.config import DecoderConfig
from dspark.models.layer_stack import LayerStack
from dspark.models.layers import compiled, linear_map, rms_norm, rotary_table, rotate_, silu_mul, storage_dtype
from dspark.sampling import first_maximum, truncated_probs


class Attention(Protocol):
    """Stores this step's keys and values and attends, request by request."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [N, H, D], kv [N, 2, K, D] (rotated keys, values) -> [N, H*D]."""
        ...


class DecoderLayer:
    """One pre-norm layer of the Llama, Mistral or Qwen family: fused QKV and gate/up, weights packed for inference."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        rotary: Tensor,
        dtype: torch.dtype,
        deterministic: bool = False,
    ):
        """weights: Hugging Face names below `model.layers.N.`, already on the device in the compute dtype; rotary: see
        `rotary_table`; dtype: the model's precision."""

        def linear(*names: str) -> Callable[[Tensor], Tensor]:
            return linear_map(torch.cat([weights[f"{n}.weight"] for n in names]), dtype, deterministic)

        self.config, self.rotary = config, rotary
        self.qkv_proj = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = linear("self_attn.o_proj")
        self.gate_up_proj = linear("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = linear("mlp.down_proj")
        names = [f"self_attn.{n}_proj.bias" for n in "qkv"]
        self.qkv_bias = torch.cat([weights[n] for n in names]) if config.qkv_bias else None
        self.qk_norms = [weights[f"self_attn.{n}_norm.weight"] for n in "qk"] if config.qk_norm else None
        self.input_norm = weights["input_layernorm.weight"]
        self.post_attention_norm = weights["post_attention_layernorm.weight"]

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Normed input [N, C] of positions [N] -> rotated q [N, H, D] and kv [N, 2, K, D], views of one product."""
        c = self.config
        product = self.qkv_proj(x) if self.qkv_bias is None else self.qkv_proj(x) + self.qkv_bias
        heads = product.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        if self.qk_norms is not None:
            parts = heads[:, : c.num_heads], heads[:, c.num_heads : c.num_heads + c.num_kv_heads]
            for part, weight in zip(parts, self.qk_norms, strict=True):
                part.copy_(rms_norm(part.reshape(-1, c.head_dim), weight, c.rms_norm_eps).view(part.shape))
        rotate_(heads, c.num_heads + c.num_kv_heads, self.rotary, positions)
        kv = heads[:, c.num_heads :].view(-1, 2, c.num_kv_heads, c.head_dim)
        return heads[:, : c.num_heads], kv

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(
            silu_mul(self.gate_up_proj(rms_norm(x, self.post_attention_norm, self.config.rms_norm_eps)))
        )

    def __call__(self, x: Tensor, positions: Tensor, layer: int, attention: Attention) -> Tensor:
        q, kv = self.qkv(rms_norm(x, self.input_norm, self.config.rms_norm_eps), positions)
        x = x + self.o_proj(attention(layer, q, kv))
        return x + self.mlp(x)


@dataclass
class DecoderOutput:
    """hidden [N, C]: output of the final norm; taps: outputs [N, C] of the layers asked for, in their order."""

    hidden: Tensor
    taps: list[Tensor]


class Decoder:
    """A frozen target on one device.

    `dtype` is the precision of the weights; `compute_dtype` is what products run in (see `storage_dtype`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        state_dict: dict[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        deterministic: bool = False,
    ):
        """state_dict: Hugging Face names and shapes. Raises ValueError if a tensor is missing or misshapen.

        deterministic: a token's outputs are the same to the last bit in any batch (only where the compiled
        operations run, else ValueError); arithmetic is then fp32.
        """
        self.config, self.dtype, self.device, self.deterministic = config, dtype, torch.device(device), deterministic
        if deterministic and (self.device.type != "cpu" or not cpu_ops.available()):
            raise ValueError("deterministic mode needs the compiled operations: an x86 CPU with AVX2 and GNU OpenMP")
        self.compute_dtype = torch.float32 if deterministic else storage_dtype(dtype, self.device)
        check_shapes(config, state_dict)

        def place(name: str) -> Tensor:
            return state_dict[name].to(dtype).to(self.device, self.compute_dtype)

        self.embedding = place("model.embed_tokens.weight")  # [V, C]
        # Plain weight beside the packed one: drafters prune it, training multiplies with its transpose.
        self.lm_head_weight = self.embedding if config.tie_embeddings else place("lm_head.weight")
        self.lm_head = linear_map(self.lm_head_weight, dtype, deterministic, reuses_memory=True)
        self.final_norm = place("model.norm.weight")
        self.rotary = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta, self.device)
        self.layers = []
        for i in range(config.num_layers):
            weights = {n: place(f"model.layers.{i}.{n}") for n in layer_shapes(config)}
            self.layers.append(DecoderLayer(config, weights, self.rotary, dtype, deterministic))
        self._stack = LayerStack(self.layers, self.final_norm)

    @property
    def kv_dtype(self) -> torch.dtype:
        """What keys and values are cached in; the compiled attention reads those of a bf16 model in bf16."""
        in_bf16 = self.dtype is torch.bfloat16 and self.device.type == "cpu" and cpu_ops.available()
        return torch.bfloat16 if in_bf16 else self.compute_dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [N] -> [N, C]."""
        return self.embedding[tokens]

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, tap_layers: Iterable[int] = ()
    ) -> DecoderOutput:
        """tokens, positions [N] int64 -> hidden states of all N tokens; `logits` turns rows of them into scores."""
        tap_layers = tuple(tap_layers)
        hidden, taps = self._stack(self.embed(tokens), positions, attention, tap_layers)
        return DecoderOutput(hidden, [taps[i] for i in tap_layers])

    def likeliest(self, logits: Tensor) -> Tensor:
        """Token [N] of the first maximum of each row of logits [N, V]."""
        if compiled(logits) and logits.is_contiguous():
            return cpu_ops.first_maximum(logits)
        return first_maximum(logits)

    def truncated_probs(self, logits: Tensor, settings: NDArray[np.float64]) -> Tensor:
        """`dspark.sampling.truncated_probs` of logits [N, V] in fp32, which may be written over.

        settings [N, 4]: temperature, top-k, top-p and min-p of each row.
        """
        if compiled(logits) and logits.is_contiguous():
            return cpu_ops.truncated_probs(logits, settings.astype(np.float32))
        return truncated_probs(logits, *settings.T)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] -> logits [N, V], valid until the next call."""
        return self.lm_head(hidden)


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name below `model.layers.N.` -> shape, for one layer."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (c.q_size, c.hidden_size),
        "self_attn.k_proj.weight": (c.kv_size, c.hidden_size),
        "self_attn.v_proj.weight": (c.kv_size, c.hidden_size),
        "self_attn.o_proj.weight": (c.hidden_size, c.q_size),
        "mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
        "input_layernorm.weight": (c.hidden_size,),
        "post_attention_layernorm.weight": (c.hidden_size,),
    }
    if c.qkv_bias:
        shapes |= {f"self_attn.{n}_proj.bias": (c.q_size if n == "q" else c.kv_size,) for n in "qkv"}
    if c.qk_norm:
        shapes |= {f"self_attn.{n}_norm.weight": (c.head_dim,) for n in "qk"}
    return shapes


def check_shapes(config: DecoderConfig, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError on the first tensor that is missing or does not fit the config."""
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for i in range(config.num_layers):
        expected |= {f"model.layers.{i}.{n}": shape for n, shape in layer_shapes(config).items()}
    for name, shape in expected.items():
        if name not in state_dict:
            raise ValueError(f"the model's weights lack '{name}': the file is incomplete or of another family")
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(f"'{name}' has shape {tuple(state_dict[name].shape)}, its config asks for {shape}")
