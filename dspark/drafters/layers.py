"""What trainable drafters share: their configuration, what the trainer asks of them, and draft layers.

Parameter names are those of the official checkpoints.
Shapes: S sequences, T positions, A anchors, G block size, B slots of a block that are seen, C width, H query heads,
K KV heads, D head width, V' draft vocabulary, r head rank.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.autograd import BlockAttention
from dspark.drafters.copying import Copies
from dspark.models.config import DecoderConfig
from dspark.models.layers import apply_rotary, rms_norm, rotary_table

MOST_SLOTS = 512  # of a block
LENGTHS = 64  # batches in training are padded to a multiple of it: oneDNN compiles its products anew for every size


@dataclass(frozen=True)
class DrafterConfig:
    """What every drafter has; `decoder` is the shape of its target, which its layers share."""

    kind: ClassVar[str]  # what its checkpoints call it

    decoder: DecoderConfig
    tap_layers: tuple[int, ...]
    block_size: int
    draft_vocab_size: int
    window: int = field(default=0, kw_only=True)  # positions before the anchor that draft layers see; 0: all

    def __post_init__(self) -> None:
        if not self.tap_layers or not all(0 <= i < self.decoder.num_layers for i in self.tap_layers):
            raise ValueError(f"tap layers {self.tap_layers} must lie in 0..{self.decoder.num_layers - 1}")
        if not 1 <= self.block_size <= MOST_SLOTS:
            raise ValueError(f"block_size must be at least 1 and at most {MOST_SLOTS}, not {self.block_size}")
        if self.window < 0:
            raise ValueError(f"window must be at least 0, not {self.window}")
        if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
            raise ValueError(f"draft_vocab_size must lie in 1..{self.decoder.vocab_size}")


def check_fit(config: DrafterConfig, theirs: DecoderConfig) -> None:
    """Raise ValueError unless the drafter's vocabulary, width, heads and tap layers fit the target's shape."""
    ours = config.decoder
    for name, what in (
        ("vocab_size", "vocabulary"),
        ("hidden_size", "width"),
        ("head_dim", "head width"),
        ("rope_theta", "rotary base"),
    ):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"the drafter was trained for a target of {what} {getattr(ours, name)}, this target has "
                f"{getattr(theirs, name)}; train one for this model with 'dspark train'"
            )
    if max(config.tap_layers) >= theirs.num_layers:
        raise ValueError(
            f"the drafter reads target layers {list(config.tap_layers)}, this target has {theirs.num_layers} layers"
        )
    if config.block_size >= theirs.max_position_embeddings:
        raise ValueError(
            f"the drafter's blocks of {config.block_size} tokens leave no room in this target's context of "
            f"{theirs.max_position_embeddings}"
        )


Config = TypeVar("Config", bound=DrafterConfig)
Rotary = tuple[Tensor, Tensor]  # cos and sin, [..., 1, D] each


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Computed in fp32; under autocast, in the precision of the products that follow; frozen, in the weight's."""
        if not self.weight.requires_grad:
            return rms_norm(x, self.weight, self.eps)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(dtype)


class DraftAttention(nn.Module):
    """Each block attends to the context before its anchor and to its own slots."""

    def __init__(self, c: DecoderConfig, input_size: int | None = None):
        super().__init__()
        self.config, width = c, input_size or c.hidden_size
        self.q_proj = nn.Linear(width, c.q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(width, c.kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(width, c.kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.q_size, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) for _ in range(2))

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[..., C] -> rotated [..., H, D]."""
        heads = self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        return apply_rotary(self.q_norm(heads) if self.config.qk_norm else heads, *rotary)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """[..., C] -> rotated keys and values [..., K, D] each."""
        shape = (self.config.num_kv_heads, self.config.head_dim)
        keys, values = self.k_proj(x).unflatten(-1, shape), self.v_proj(x).unflatten(-1, shape)
        return apply_rotary(self.k_norm(keys) if self.config.qk_norm else keys, *rotary), values

    def forward(
        self, q: Tensor, block: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor], context_mask: Tensor
    ) -> Tensor:
        """q [S, A, G, H, D], keys and values of the block [S, A, B, K, D] and of the context [S, T, K, D] ->
        [S, A, G, C]. All B slots are seen, and the context where context_mask [S, A, T] is True."""
        c = self.config
        s, a, g, *_ = q.shape
        kv_heads, group, d = c.num_kv_heads, c.group_size, c.head_dim
        rows = (q * d**-0.5).view(s, a, g, kv_heads, group, d).permute(0, 3, 1, 4, 2, 5)  # [S, K, A, group, G, D]
        rows = rows.reshape(s * kv_heads, a * group * g, d)
        of_block = (t.permute(0, 3, 1, 2, 4).reshape(s * kv_heads * a, -1, d) for t in block)
        of_context = (t.transpose(1, 2).reshape(s * kv_heads, -1, d) for t in context)
        out = BlockAttention.apply(rows, *of_context, *of_block, context_mask)  # pyright: ignore
        out = out.view(s, kv_heads, a, group, g, d).permute(0, 2, 4, 1, 3, 5)
        return self.o_proj(out.reshape(s, a, g, -1))


class DraftMLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One decoder layer over blocks; input_size: what its attention reads where that is not C."""

    def __init__(self, c: DecoderConfig, input_size: int | None = None):
        super().__init__()
        self.self_attn = DraftAttention(c, input_size)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor, of_block: Rotary, of_context: Rotary) -> Tensor:
        """x [S, A, G, C], whose slots all see each other, and context [S, T, C], not normed here -> [S, A, G, C]."""
        normed, attention = self.input_layernorm(x), self.self_attn
        own, seen = attention.keys_values(normed, of_block), attention.keys_values(context, of_context)
        return self.add_mlp(x + attention(attention.queries(normed, of_block), own, seen, context_mask))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class SlotOutputs(NamedTuple):
    """What a drafter says of all slots: logits are hidden times the LM head plus features times w2 plus copies' bias.

    hidden [S, A, G, C]; features [S, A, G, r], w2 [V', r], r = 0 without a sequential head; confidence logits
    [S, A, G], None without that head; copies [S, A, G], None without a copy head.
    """

    hidden: Tensor
    features: Tensor
    w2: Tensor
    confidence: Tensor | None = None
    copies: Copies | None = None


class DraftModel(nn.Module, Generic[Config]):
    """A trainable drafter: `forward` for training, weights for the drafter that serves.

    Embedding and LM head are the target's, frozen, and passed in where needed. `d2t` [V'] maps draft vocabulary to
    target vocabulary.
    """

    config: Config
    d2t: Tensor
    _rotary: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c = config.decoder
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size))
        positions = c.max_position_embeddings + LENGTHS + config.block_size  # padding and blocks reach past the end
        table = rotary_table(positions, c.head_dim, c.rope_theta, torch.device("cpu"))
        self.register_buffer("_rotary", table, persistent=False)

    @abstractmethod
    def forward(self, taps: Tensor, tokens: Tensor, anchors: Tensor, embedding: Tensor) -> SlotOutputs:
        """Blocks teacher forced, each isolated from the others, with the heads in fp32 under autocast too.

        taps [S, T, taps*C] and tokens [S, T] of all positions, anchors [S, A], the target's embedding [V, C]. Slot k
        of a block sees taps before the anchor and tokens up to k after it.
        """

    @abstractmethod
    def initialize_from_target(
        self, layers: list[dict[str, Tensor]], final_norm: Tensor, embedding: Tensor, tap_rms: float
    ) -> None:
        """Start with copies of target layers, dicts of Hugging Face names below `model.layers.N.`.

        final_norm [C], embedding [V, C] are the target's too; tap_rms: how large an element of the last tap is.
        """

    @property
    def t2d(self) -> Tensor:
        """Index in the draft vocabulary of each of the target's tokens [V], -1 outside of it; a new tensor."""
        ids = self.d2t.new_full((self.config.decoder.vocab_size,), -1)
        ids[self.d2t] = torch.arange(len(self.d2t), device=ids.device)
        return ids

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin [..., 1, D] of positions [...]."""
        cos, sin = self._rotary[positions].unbind(-2)
        return cos[..., None, :], sin[..., None, :]

    def context_mask(self, anchors: Tensor, length: int) -> Tensor:
        """Which of `length` positions a block sees, [S, A, T]: those before its anchor, in the window."""
        distance = anchors[..., None] - torch.arange(length, device=anchors.device)
        return (distance > 0) & (distance <= (self.config.window or length))


def block_tokens(tokens: Tensor, anchors: Tensor, block_size: int) -> Tensor:
    """The token before each slot [S, A, G] from tokens [S, T], the last one again past the end."""
    positions = anchors[..., None] + torch.arange(block_size, device=anchors.device)
    return tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1).flatten(1)).view(positions.shape)
