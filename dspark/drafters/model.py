"""The DSpark drafter as a trainable module: parallel backbone, sequential head, confidence head (design §3).

Without a head it is DFlash. Inference packs the same weights (`drafters/dspark.py`).
Shapes: S sequences, T positions, A anchors, G block size, C width, V' draft vocabulary, r head rank.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.copying import CopyHead
from dspark.drafters.layers import DrafterConfig, DraftLayer, DraftModel, RMSNorm, SlotOutputs, block_tokens


@dataclass(frozen=True)
class DSparkConfig(DrafterConfig):
    """What a DSpark drafter is made of.

    markov_rank 0: no sequential head, as in DFlash; `markov_head` says which one else.
    feature_input: slots start from a projection of [norm(fused taps before the anchor); norm(token)], as MTP's layer
    does, instead of the token alone. Ours: the official format has no such drafters.
    copy_length: longest match that the copy head tells apart (`copying.py`); 0: no such head. Ours too.
    own_position: the block is the anchor's slot, which predicts nothing, and block_size masks that predict the token
    at their own position (DFlash as z-lab has it); else each slot predicts the next position's token.
    """

    kind: ClassVar[str] = "dspark"

    num_draft_layers: int
    markov_rank: int
    mask_token_id: int
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    own_position: bool = False
    feature_input: bool = False
    copy_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_draft_layers", 1), ("markov_rank", 0), ("copy_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.markov_head not in ("vanilla", "gated", "rnn"):
            raise ValueError(f"markov_head must be vanilla, gated or rnn, not '{self.markov_head}'")
        if not 0 <= self.mask_token_id < self.decoder.vocab_size:
            raise ValueError(f"mask_token_id must lie in 0..{self.decoder.vocab_size - 1}")

    @property
    def num_slots(self) -> int:
        """Positions of a block, the anchor's included."""
        return self.block_size + self.own_position


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


class DSparkModel(DraftModel[DSparkConfig]):
    """Backbone and heads."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        c = config.decoder
        self.fc = nn.Linear(len(config.tap_layers) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if config.feature_input:
            self.feature_norm, self.token_norm = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
            self.input_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList(DraftLayer(c) for _ in range(config.num_draft_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        self.copy_head = CopyHead(config.block_size, config.copy_length) if config.copy_length else None

    def forward(self, taps: Tensor, tokens: Tensor, anchors: Tensor, embedding: Tensor) -> SlotOutputs:
        hidden = self.backbone(taps, tokens, anchors, embedding).float()
        with torch.autocast(hidden.device.type, enabled=False):
            features, confidence = self.heads(hidden, block_tokens(tokens, anchors, self.config.block_size))
        copies = None if self.copy_head is None else self.copy_head(tokens, anchors)
        return SlotOutputs(hidden, features, self.w2, confidence, copies)

    def backbone(self, taps: Tensor, tokens: Tensor, anchors: Tensor, embedding: Tensor) -> Tensor:
        """Normed hidden states h_k [S, A, G, C]; of tokens, only the anchors' are read."""
        fused = self.fc(taps)
        context = self.hidden_norm(fused)
        block = torch.arange(self.config.num_slots, device=anchors.device)
        of_block = self.rotary(anchors[..., None] + block)
        of_context = self.rotary(torch.arange(taps.shape[1], device=anchors.device))
        context_mask = self.context_mask(anchors, taps.shape[1])
        x = self.block_inputs(fused, tokens, anchors, embedding)
        for layer in self.layers:
            x = layer(x, context, context_mask, of_block, of_context)
        return self.norm(x[:, :, -self.config.block_size :])

    def block_inputs(self, fused: Tensor, tokens: Tensor, anchors: Tensor, embedding: Tensor) -> Tensor:
        """What the first layer gets, [S, A, slots, C] fp32: the anchor's, then the masks'; fused taps [S, T, C]."""
        first = embedding[tokens.gather(1, anchors)].float()  # [S, A, C]
        mask = embedding[self.config.mask_token_id, None].float()  # [1, C]
        if self.config.feature_input:
            before = F.pad(fused, (0, 0, 1, -1))  # of the position before each, zeros at 0
            feature = self.feature_norm(before.gather(1, anchors[..., None].expand(-1, -1, before.shape[-1])))
            of_feature, of_token = self.input_proj.weight.chunk(2, 1)
            first, mask = (F.linear(self.token_norm(token), of_token) for token in (first, mask))
            feature = F.linear(feature, of_feature)
            first, mask = feature + first, feature + mask
        return torch.stack([first, *[mask.expand_as(first)] * (self.config.num_slots - 1)], 2).float()

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

    def initialize_from_target(
        self, layers: list[dict[str, Tensor]], final_norm: Tensor, embedding: Tensor, tap_rms: float
    ) -> None:
        """Start as copies of target layers, one for each draft layer, whose first one reads the last tap.

        `fc` starts as the identity on the last tap and its norm as the first layer's input norm; the later layers' K
        and V maps absorb the ratio of their own input norm to it. W1 starts as the embedding's leading principal
        components, W2 as zero: the bias is learned, its geometry given.
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
            if self.config.feature_input:  # the first layer begins with its own input, and learns the token
                self.input_proj.weight.zero_()
                self.input_proj.weight[:, :c].copy_(torch.eye(c))
                self.feature_norm.weight.fill_(tap_rms)
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
