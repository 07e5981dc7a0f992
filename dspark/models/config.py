"""Shape of a decoder-only target, read once from a Hugging Face config and from nowhere else."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

MOST = 1 << 22  # of any size: far above every model, and below what would ask for all memory there is
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderConfig:
    """Everything the decoder needs to know about a model; widths in elements, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_position_embeddings: int = 2048
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: queries and keys are normed head by head before they are rotated

    def __post_init__(self) -> None:
        sizes = "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"
        for name in (*sizes, "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} must lie in 1..{MOST}, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if not 2 <= self.head_dim <= MOST or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and lie in 2..{MOST}, not {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, not {getattr(self, name)}")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: PretrainedConfig) -> "DecoderConfig":
        """All guesses about Hugging Face configs stay here.

        Raises ValueError for a family or a feature that the decoder does not compute.
        """
        if config.model_type not in SUPPORTED_FAMILIES:
            raise ValueError(
                f"model type '{config.model_type}' is not supported; supported: {', '.join(SUPPORTED_FAMILIES)}"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope type '{rope['rope_type']}' is not supported; only 'default' is")
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise ValueError("models with attention or MLP biases are not supported")
        if config.hidden_act != "silu":
            raise ValueError(f"activation '{config.hidden_act}' is not supported; only 'silu' is")
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if window is not None and window < config.max_position_embeddings:
            raise ValueError(f"attention in a sliding window of {window} tokens is not supported")
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rope_theta=float(rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))),
            rms_norm_eps=config.rms_norm_eps,
            tie_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type == "qwen3",
        )
