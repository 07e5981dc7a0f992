"""Drafters that draft token by token with one decoder layer of their own: what EAGLE-3 and MTP share.

The layer reads pairs and predicts the next token: at position p the token x_p and the feature of position p - 1, zeros
at 0. Features of committed positions come from the target's taps, those of drafted ones are the layer's own outputs.
Shapes: S sequences, T positions, A anchors, G block size, C width, I width of what attention reads; R requests,
N committed tokens.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.bound import BoundDrafter, Slot, packed, whole_draft
from dspark.drafters.interface import DraftRequest
from dspark.drafters.layers import Config, DraftLayer, DraftModel, RMSNorm, SlotOutputs, block_tokens
from dspark.models.attention import CachedAttention, store
from dspark.models.decoder import Decoder, DecoderLayer, layer_shapes
from dspark.spec.draft import Draft


class ChainModel(DraftModel[Config]):
    """The layer over blocks, trained as it drafts: each slot from the layer's own output of the slot before."""

    def __init__(self, config: Config, input_size: int):
        super().__init__(config)
        self.layer = DraftLayer(config.decoder, input_size)
        self.norm = RMSNorm(config.decoder.hidden_size, config.decoder.rms_norm_eps)

    @abstractmethod
    def fuse(self, taps: Tensor) -> Tensor:
        """[..., taps*C] -> the feature [..., C] of a committed position."""

    @abstractmethod
    def pair(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens and of the positions before, [..., C] each -> residual [..., C], what attention reads [..., I]."""

    def forward(self, taps: Tensor, tokens: Tensor, anchors: Tensor, embedding: Tensor) -> SlotOutputs:
        attention = self.layer.self_attn
        before = F.pad(self.fuse(taps), (0, 0, 1, -1))  # [S, T, C]
        _, inputs = self.pair(embedding[tokens].float(), before)
        positions = torch.arange(taps.shape[1], device=taps.device)
        context = attention.keys_values(inputs, self.rotary(positions))
        context_mask = self.context_mask(anchors, len(positions))

        feature = before.gather(1, anchors[..., None].expand(-1, -1, before.shape[-1]))  # [S, A, C]
        keys, values, hidden = [], [], []
        for k, own in enumerate(block_tokens(tokens, anchors, self.config.block_size).unbind(-1)):
            residual, inputs = self.pair(embedding[own].float(), feature)
            rotary = self.rotary(anchors + k)
            for kept, new in zip((keys, values), attention.keys_values(inputs, rotary), strict=True):
                kept.append(new)
            query = attention.queries(inputs, rotary)[:, :, None]
            seen = attention(query, (torch.stack(keys, 2), torch.stack(values, 2)), context, context_mask)
            feature = self.layer.add_mlp(residual + seen[:, :, 0])
            hidden.append(self.norm(feature))
        hidden = torch.stack(hidden, 2).float()
        no_head = hidden.new_zeros(*hidden.shape[:3], 0), hidden.new_zeros(self.config.draft_vocab_size, 0)
        return SlotOutputs(hidden, *no_head)


class ChainDrafter(BoundDrafter):
    """The packed layer, its keys and values of committed pairs, and the features of committed positions."""

    has_confidence = False

    def __init__(self, model: ChainModel, target: Decoder):
        """Raises ValueError if the drafter was trained for a target of another shape."""
        c = model.config.decoder
        super().__init__(model, target, [(2, c.num_kv_heads, c.head_dim), (c.hidden_size,)])
        self.decoder, self.model = c, packed(model, target)
        weights = {name: self.model.layer.get_parameter(name) for name in layer_shapes(c)}
        self.layer = DecoderLayer(c, weights, target.rotary, target.dtype)

    @torch.inference_mode()
    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        kv, features = self._storage
        features.index_copy_(0, slots, self.model.fuse(torch.cat(taps, -1)).to(features.dtype))
        known = self.features_before(features, before(positions, slots))
        _, inputs = self.model.pair(self.target.embed(tokens), known)
        store(self.layer.qkv(inputs, positions)[1], kv, slots)

    @torch.inference_mode()
    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        device = self.target.device
        positions = torch.tensor([len(r.token_ids) - 1 for r in requests], device=device)
        own = torch.tensor([r.first_slot for r in requests], device=device) + positions
        token = torch.tensor([r.token_ids[-1] for r in requests], device=device)
        feature = self.features_before(self._storage[1], before(positions, own))
        draw = self.sampler(requests)
        drawn: list[Slot] = []
        for k in range(slots):
            residual, inputs = self.model.pair(self.target.embed(token), feature)
            q, kv = self.layer.qkv(inputs, positions + k)
            segments = [self.segment(r, 1, k + 1) for r in requests]
            attention = CachedAttention(self._storage[:1], own + k, segments, self.decoder.group_size)
            x = residual + self.layer.o_proj(attention(0, q, kv))
            feature = x + self.layer.mlp(x)
            logits = self.logits(self.model.norm(feature))
            drawn.append(draw(k, logits))
            token = drawn[-1].token
        return whole_draft(drawn)


def before(positions: Tensor, slots: Tensor) -> Tensor:
    """Slots of the positions before these [N], -1 where there is none."""
    return torch.where(positions > 0, slots - 1, -1)
