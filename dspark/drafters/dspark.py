"""The DSpark drafter at inference: one parallel pass over the block, then the Markov head left to right.

Shapes: R requests, G slots, N = R*G block tokens, M candidates, C width, V' draft vocabulary, r head rank.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.interface import DraftRequest
from dspark.drafters.model import DSparkConfig, DSparkModel
from dspark.models.attention import CachedAttention, Segment, copy_slots, empty_cache, store
from dspark.models.config import DecoderConfig
from dspark.models.decoder import Decoder, DecoderLayer, layer_shapes
from dspark.models.layer_stack import LayerStack
from dspark.models.layers import linear_map, rms_norm, rotate_
from dspark.sampling import Purpose, categorical, truncated_probs, uniforms
from dspark.spec.draft import Draft

NUM_CANDIDATES = 64  # tokens a slot is sampled from: the likeliest after the Markov bias


class Slot(NamedTuple):
    """One slot of all blocks: token [R], and what it was drawn from, support and draft_probs [R, M]."""

    token: Tensor
    support: Tensor
    draft_probs: Tensor


class DSparkDrafter:
    """A trained drafter bound to its target: packed weights and the cached context of all running requests.

    Sampling covers each slot's NUM_CANDIDATES likeliest tokens; the verifier gets that very distribution.
    """

    def __init__(self, model: DSparkModel, target: Decoder):
        """Raises ValueError if the drafter was trained for a target of another shape."""
        check_fit(model.config, target.config)
        self.config, self.target = model.config, target
        c, dtype, device = model.config.decoder, target.compute_dtype, target.device

        def place(weight: Tensor) -> Tensor:
            return weight.detach().to(device, dtype)

        weights = [
            {name: place(layer.get_parameter(name)) for name in layer_shapes(c)}  # pyright: ignore
            for layer in model.layers
        ]
        self.layers = [DecoderLayer(c, w, target.dtype) for w in weights]
        self._stack = LayerStack(self.layers)
        # The context is the same for every layer, so one product gives the K and V of all of them, keys first.
        context_kv = torch.cat([w[f"self_attn.{n}_proj.weight"] for n in ("k", "v") for w in weights])
        self.context_kv = linear_map(context_kv, target.dtype)
        self.context_bias = self.context_norm = None
        if c.qkv_bias:
            self.context_bias = torch.cat([w[f"self_attn.{n}_proj.bias"] for n in ("k", "v") for w in weights])
        if c.qk_norm:
            self.context_norm = torch.stack([w["self_attn.k_norm.weight"] for w in weights])[:, None]  # [L, 1, D]
        self.fc = linear_map(place(model.fc.weight), target.dtype)
        self.hidden_norm = place(model.hidden_norm.weight)
        self.norm = place(model.norm.weight)
        self.d2t = model.d2t.to(device)
        self.head = linear_map(target.lm_head_weight[self.d2t], target.dtype)
        self.markov = None
        if model.markov_head is not None:
            self.markov = copy.deepcopy(model.markov_head).to(device, dtype)
            self.w2 = linear_map(place(model.w2), target.dtype)  # [R, r] -> [R, V']
        self.confidence_head = None
        if model.confidence_head is not None:
            self.confidence_head = copy.deepcopy(model.confidence_head).to(device, dtype)
        self.mask_embedding = target.embedding[model.config.mask_token_id]
        self._storage: list[Tensor] = []

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def has_confidence(self) -> bool:
        return self.confidence_head is not None

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return self.config.tap_layers

    @property
    def slot_bytes(self) -> int:
        return len(self.layers) * 2 * self.config.decoder.kv_size * self.target.kv_dtype.itemsize

    def allocate(self, num_slots: int) -> None:
        c = self.config.decoder
        shape = (num_slots, 2, c.num_kv_heads, c.head_dim)
        self._storage = [empty_cache(shape, self.target.kv_dtype, self.target.device) for _ in self.layers]

    @torch.inference_mode()
    def extend(self, taps: list[Tensor], positions: Tensor, slots: Tensor) -> None:
        c = self.config.decoder
        context = rms_norm(self.fc(torch.cat(taps, -1)), self.hidden_norm, c.rms_norm_eps)
        product = self.context_kv(context)
        if self.context_bias is not None:
            product = product + self.context_bias
        heads = product.view(len(positions), -1, c.head_dim)
        num_keys = len(self.layers) * c.num_kv_heads
        if self.context_norm is not None:
            keys = heads[:, :num_keys].unflatten(1, (len(self.layers), c.num_kv_heads))  # [N, L, K, D]
            keys.copy_(F.rms_norm(keys, (c.head_dim,), eps=c.rms_norm_eps) * self.context_norm)
        rotate_(heads, num_keys, *self.target.rotary(positions))
        kv = heads.view(len(positions), 2, len(self.layers), c.num_kv_heads, c.head_dim)
        for storage, layer_kv in zip(self._storage, kv.unbind(2), strict=True):
            store(layer_kv, storage, slots)

    @torch.inference_mode()
    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        copy_slots(self._storage, source_slot, target_slot, count)

    @torch.inference_mode()
    def propose(self, requests: list[DraftRequest]) -> Draft:
        return self.decode_block(requests, self.backbone(requests))

    def backbone(self, requests: list[DraftRequest]) -> Tensor:
        """One parallel pass over all blocks -> hidden states [R, G, C]."""
        g, device = self.block_size, self.target.device
        anchors = torch.tensor([len(r.token_ids) - 1 for r in requests], device=device)
        offsets = torch.arange(g, device=device)
        positions = (anchors[:, None] + offsets).flatten()
        first_slots = torch.tensor([r.first_slot for r in requests], device=device)
        slots = (first_slots[:, None] + anchors[:, None] + offsets).flatten()
        x = self.mask_embedding.repeat(len(requests) * g, 1)
        x[::g] = self.target.embed(torch.tensor([r.token_ids[-1] for r in requests], device=device))
        cos, sin = self.target.rotary(positions)

        segments = [Segment(g, r.first_slot, len(r.token_ids) - 1 + g, causal=False) for r in requests]
        attention = CachedAttention(self._storage, slots, segments, self.config.decoder.group_size)
        x, _ = self._stack(x, cos, sin, attention)
        return rms_norm(x, self.norm, self.config.decoder.rms_norm_eps).view(len(requests), g, -1)

    def decode_block(self, requests: list[DraftRequest], hidden: Tensor) -> Draft:
        """The sequential head, left to right over hidden [R, G, C], each slot from the token sampled before it."""
        r, g, _ = hidden.shape
        base_logits = self.head(hidden.flatten(0, 1)).view(r, g, -1)  # [R, G, V']
        greedy = all(q.params.greedy for q in requests)
        settings, draws = self._settings(requests), self._draws(requests)  # [R] each, [R, G]
        previous = torch.tensor([q.token_ids[-1] for q in requests], device=hidden.device)
        slots: list[Slot] = []
        rank = self.config.markov_rank
        embeddings, state = hidden.new_empty(r, g, rank), hidden.new_zeros(r, rank)
        for k in range(g):
            logits = base_logits[:, k].float()
            if self.markov is not None:
                embeddings[:, k] = self.markov.markov_w1(previous)
                features, state = self.markov.step(embeddings[:, k], hidden[:, k], state)
                # The Markov bias decides most later slots: candidates are picked after it, never before.
                logits = logits + self.w2(features).float()
            slots.append(self.best(logits) if greedy else self.sample(logits, settings, draws[:, k]))
            previous = slots[-1].token
        confidence = torch.zeros(r, g, device=hidden.device)
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, embeddings).float()
        tokens, support, draft_probs = (torch.stack(column, 1) for column in zip(*slots, strict=True))
        return Draft(tokens, support, draft_probs, confidence, torch.full((r,), g))

    def best(self, logits: Tensor) -> Slot:
        """The likeliest token of each row [R, V'], no randomness."""
        token = self.d2t[logits.argmax(-1)]
        return Slot(token, token[:, None], torch.ones_like(logits[:, :1]))

    def sample(self, logits: Tensor, settings: list[Tensor], draws: Tensor) -> Slot:
        """Logits [R, V'] -> one token a row, from its likeliest candidates under the request's own parameters."""
        logits, candidates = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]))
        candidates, order = candidates.sort(-1)  # in the target's order a shared draw lands in the same place, mostly
        logits = logits.gather(-1, order)
        support = self.d2t[candidates]
        draft_probs = truncated_probs(logits.nan_to_num(), *settings)  # a broken drafter costs time, not the engine
        index = categorical(draft_probs, draws)[:, None]
        return Slot(support.gather(1, index).squeeze(1), support, draft_probs)

    def _settings(self, requests: list[DraftRequest]) -> list[Tensor]:
        """Temperature, top-k, top-p and min-p, [R] each."""
        params = [q.params for q in requests]
        values = zip(*((p.temperature, p.top_k, p.top_p, p.min_p) for p in params), strict=True)
        return [torch.tensor(column, device=self.d2t.device) for column in values]

    def _draws(self, requests: list[DraftRequest]) -> Tensor:
        """The uniform [R, G] that samples each slot; the token of slot k lands at anchor position + 1 + k."""
        slots = range(self.block_size)
        seeds = [[q.seed] for q in requests]
        positions = [[len(q.token_ids) + k for k in slots] for q in requests]
        draws = uniforms(seeds, positions, Purpose.DRAFT, list(slots))
        coupled = np.array([[q.coupled] for q in requests])
        if coupled.any():  # the target's own draw for the position
            draws = np.where(coupled, uniforms(seeds, positions, Purpose.TARGET), draws)
        return torch.from_numpy(draws).to(self.d2t.device)


def check_fit(config: DSparkConfig, theirs: DecoderConfig) -> None:
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
