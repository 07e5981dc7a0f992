"""The DSpark drafter as a trainable module: parallel backbone, sequential head, confidence head (design §3).

Without a head it is DFlash.

Parameter names are those of the official checkpoints. Inference packs the same weights (`drafters/dspark.py`).
Shapes: S sequences, T positions, A anchors, G block size, C width, V' draft vocabulary, r head rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.models.config import DecoderConfig
from dspark.models.layers import apply_rotary, rms_norm, rotary_table


@dataclass(frozen=True)
class DSparkConfig:
    """What a DSpark drafter is made of; `decoder` gives the shape of one draft layer.

    markov_rank 0: no sequential head, as in DFlash; `markov_head` says which one else.
    """

    decoder: DecoderConfig
    tap_layers: tuple[int, ...]
    block_size: int
    num_draft_layers: int
    markov_rank: int
    mask_token_id: int
    draft_vocab_size: int
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True

    def __post_init__(self) -> None:
        if not self.tap_layers or not all(0 <= i < self.decoder.num_layers for i in self.tap_layers):
            raise ValueError(f"tap layers {self.tap_layers} must lie in 0..{self.decoder.num_layers - 1}")
        for name, least in (("block_size", 1), ("num_draft_layers", 1), ("markov_rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.markov_head not in ("vanilla", "gated", "rnn"):
            raise ValueError(f"markov_head must be vanilla, gated or rnn, not '{self.markov_head}'")
        if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
            raise ValueError(f"draft_vocab_size must lie in 1..{self.decoder.vocab_size}")
        if not 0 <= self.mask_token_id < self.decoder.vocab_size:
            raise ValueError(f"mask_token_id must lie in 0..{self.decoder.vocab_size - 1}")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)  # autocast hands bf16 products in


class DraftAttention(nn.Module):
    """Each block attends to the context before its anchor and to all of its own slots, in both directions."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.hidden_size, c.q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.q_size, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., H, D], not yet rotated."""
        heads = self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        return self.q_norm(heads) if self.config.qk_norm else heads

    def keys(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., K, D], not yet rotated."""
        heads = self.k_proj(x).unflatten(-1, (self.config.num_kv_heads, self.config.head_dim))
        return self.k_norm(heads) if self.config.qk_norm else heads

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor, rope: "BlockRotary") -> Tensor:
        """x [S, A, G, C], context [S, T, C], context_mask [S, A, T] (True: before the anchor) -> [S, A, G, C]."""
        c = self.config
        s, a, g, _ = x.shape
        kv_heads, group, d = c.num_kv_heads, c.group_size, c.head_dim
        q = apply_rotary(self.queries(x), *rope.block)
        q = q.view(s, a, g, kv_heads, group, d).permute(0, 3, 1, 4, 2, 5)  # [S, K, A, group, G, D]
        k_block = apply_rotary(self.keys(x), *rope.block).permute(0, 3, 1, 4, 2)
        v_block = self.v_proj(x).view(s, a, g, kv_heads, d).permute(0, 3, 1, 2, 4)  # [S, K, A, G, D]
        k_context = apply_rotary(self.keys(context), *rope.context).permute(0, 2, 3, 1)
        v_context = self.v_proj(context).view(s, -1, kv_heads, d).transpose(1, 2)  # [S, K, T, D]

        rows = q.reshape(s, kv_heads, a * group * g, d) * d**-0.5
        on_context = (rows @ k_context).view(s, kv_heads, a, group * g, -1)
        on_context = on_context.masked_fill(~context_mask[:, None, :, None], float("-inf"))
        on_block = rows.view(s, kv_heads, a, group * g, d) @ k_block  # [S, K, A, group*G, G]
        weights = torch.cat([on_context, on_block], -1).softmax(-1)
        w_context, w_block = weights.split([context.shape[1], g], -1)
        out = (w_context.reshape(s, kv_heads, a * group * g, -1) @ v_context).view(s, kv_heads, a, group * g, d)
        out = (out + w_block @ v_block).view(s, kv_heads, a, group, g, d)
        return self.o_proj(out.permute(0, 2, 4, 1, 3, 5).reshape(s, a, g, -1))


class DraftMLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor, rope: "BlockRotary") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, context_mask, rope)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class BlockRotary:
    """(cos, sin) of the block slots [S, A, G, 1, D] and of the context positions [T, 1, D]."""

    block: tuple[Tensor, Tensor]
    context: tuple[Tensor, Tensor]


class MarkovHead(nn.Module):
    """The bias of a slot's logits is f W2; the features f [..., r] come from e = W1[x_{k-1}] and h_k.

    W1 [V, r] is over the whole vocabulary, W2 [V', r] over the draft vocabulary.
    vanilla  f = e
    gated    f = sigmoid(Wg [h_k; e] + b) * e
    rnn      g, candidate, f' = W [s_{k-1}; e; h_k] + b in three parts; s_k = g s_{k-1} + (1 - g) tanh(candidate);
             f = tanh(f'), g through a sigmoid, s_0 = 0
    """

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.kind, rank, width = config.markov_head, config.markov_rank, config.decoder.hidden_size
        self.markov_w1 = nn.Embedding(config.decoder.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """e [..., r], h_k [..., C], s_{k-1} [..., r] -> features f [..., r] and s_k."""
        if self.kind == "vanilla":
            return embedding, state
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedding], -1))) * embedding, state
        gate, candidate, output = self.joint_proj(torch.cat([state, embedding, hidden], -1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Features of whole blocks whose tokens are known: e [..., G, r], h [..., G, C] -> f [..., G, r]."""
        state = torch.zeros_like(embeddings[..., 0, :])
        if self.kind != "rnn":
            return self.step(embeddings, hidden, state)[0]
        features = []
        for e, h in zip(embeddings.unbind(-2), hidden.unbind(-2), strict=True):
            f, state = self.step(e, h, state)
            features.append(f)
        return torch.stack(features, -2)


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b); returns the logit [...]."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.proj = nn.Linear(config.decoder.hidden_size + config.markov_rank, 1)

    def forward(self, hidden: Tensor, markov_embedding: Tensor) -> Tensor:
        return self.proj(torch.cat([hidden, markov_embedding], -1)).squeeze(-1)


class DSparkModel(nn.Module):
    """Backbone and heads. Embedding and LM head are the target's, frozen, and passed in where needed.

    `d2t` [V'] maps draft vocabulary to target vocabulary.
    """

    d2t: Tensor
    _cos: Tensor
    _sin: Tensor

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.config = config
        c = config.decoder
        self.fc = nn.Linear(len(config.tap_layers) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(c) for _ in range(config.num_draft_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size))
        cos, sin = rotary_table(c.max_position_embeddings, c.head_dim, c.rope_theta, torch.device("cpu"))
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)

    def forward(self, taps: Tensor, anchors: Tensor, anchor_embeddings: Tensor, mask_embedding: Tensor) -> Tensor:
        """Backbone over blocks, each isolated from the others.

        taps [S, T, taps*C] of all positions; anchors [S, A] positions; anchor_embeddings [S, A, C];
        mask_embedding [C] -> normed hidden states h_k [S, A, G, C].
        """
        g = self.config.block_size
        s, a = anchors.shape
        context = self.hidden_norm(self.fc(taps))
        positions = anchors[..., None] + torch.arange(g, device=anchors.device)  # [S, A, G]
        t = torch.arange(taps.shape[1], device=anchors.device)
        rope = BlockRotary(
            (self._cos[positions][..., None, :], self._sin[positions][..., None, :]),
            (self._cos[t][:, None], self._sin[t][:, None]),
        )
        masks = mask_embedding.expand(s, a, g - 1, -1)
        x = torch.cat([anchor_embeddings[:, :, None], masks], 2)
        context_mask = t < anchors[..., None]  # [S, A, T]
        for layer in self.layers:
            x = layer(x, context, context_mask, rope)
        return self.norm(x)

    def heads(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the heads make of blocks: hidden [..., G, C], tokens [..., G] before each slot.

        -> features [..., G, r] whose product with W2 is the bias of the logits, confidence logits [..., G] or None.
        """
        embeddings = hidden.new_zeros(*tokens.shape, 0)
        if self.markov_head is not None:
            embeddings = self.markov_head.markov_w1(tokens)
        confidence = None if self.confidence_head is None else self.confidence_head(hidden, embeddings)
        features = embeddings if self.markov_head is None else self.markov_head(embeddings, hidden)
        return features, confidence

    @property
    def w2(self) -> Tensor:
        """[V', r]; r is 0 without a sequential head."""
        if self.markov_head is None:
            return self.fc.weight.new_zeros(self.config.draft_vocab_size, 0)
        return self.markov_head.markov_w2.weight

    def initialize_from_target(self, layers: list[dict[str, Tensor]], final_norm: Tensor, embedding: Tensor) -> None:
        """Start as copies of target layers whose first one reads the last tap.

        layers: one dict of Hugging Face names below `model.layers.N.` for each draft layer; final_norm [C];
        embedding [V, C]. `fc` starts as the identity on the last tap and its norm as the first layer's input
        norm; the later layers' K and V maps absorb the ratio of their own input norm to it. W1 starts as
        the embedding's leading principal components, W2 as zero: the bias is learned, its geometry given.
        """
        c = self.config.decoder.hidden_size
        first_norm = layers[0]["input_layernorm.weight"]
        with torch.no_grad():
            for layer, source in zip(self.layers, layers, strict=True):
                layer.load_state_dict(source)
                ratio = source["input_layernorm.weight"] / first_norm
                for name in ("k_proj", "v_proj"):
                    layer.get_parameter(f"self_attn.{name}.weight").mul_(
                        torch.where(first_norm.abs() > 1e-3, ratio, 1.0).clamp(-8, 8)
                    )
            self.fc.weight.zero_()
            self.fc.weight[:, -c:].copy_(torch.eye(c))
            self.hidden_norm.weight.copy_(first_norm)
            self.norm.weight.copy_(final_norm)
            if self.confidence_head is not None:
                self.confidence_head.proj.weight.zero_()
                self.confidence_head.proj.bias.zero_()
            if self.markov_head is None:
                return
            centred = (embedding - embedding.mean(0)).float()
            basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -self.config.markov_rank :]
            components = centred @ basis
            self.markov_head.markov_w1.weight.copy_(components / components.std())
            self.markov_head.markov_w2.weight.zero_()
