"""The DSpark drafter at inference: one parallel pass over the block, then the Markov head left to right.

Shapes: R requests, G slots, N committed or block tokens, C width, V' draft vocabulary, r head rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.bound import BoundDrafter, Slot, packed, sampling_rows, slot_signals, whole_draft
from dspark.drafters.copying import CopyBias
from dspark.drafters.interface import DraftRequest
from dspark.drafters.model import DSparkModel
from dspark.drafters.programs import BlockInputs, ContextProgram, MarkovProgram
from dspark.models.attention import CachedAttention, compiled_cache, copy_slots, store
from dspark.models.cpu_ops import is_dense
from dspark.models.decoder import Decoder, DecoderLayer, layer_shapes
from dspark.models.layer_stack import LayerStack
from dspark.models.layers import linear_map, rotate_
from dspark.spec.draft import Draft


class DSparkDrafter(BoundDrafter):
    """Packed weights and the cached context of all running requests."""

    def __init__(self, model: DSparkModel, target: Decoder):
        """Raises ValueError if the drafter was trained for a target of another shape."""
        c = model.config.decoder
        of_feature = [(c.hidden_size,)] if model.config.feature_input else []
        super().__init__(model, target, [(2, c.num_kv_heads, c.head_dim)] * len(model.layers) + of_feature)
        self.config, self.model = model.config, packed(model, target)
        model, dtype = self.model, target.dtype
        weights = [{name: layer.get_parameter(name) for name in layer_shapes(c)} for layer in model.layers]
        self.layers = [DecoderLayer(c, w, target.rotary, dtype) for w in weights]
        del model.layers  # whose weights are packed now
        self._stack = LayerStack(self.layers, model.norm.weight)
        # The context is the same for every layer, so one product gives the K and V of all of them.
        self.context_kv = linear_map(
            torch.cat([w[f"self_attn.{n}_proj.weight"] for w in weights for n in ("k", "v")]), dtype
        )
        self.context_bias = self.context_norm = None
        if c.qkv_bias:
            self.context_bias = torch.cat([w[f"self_attn.{n}_proj.bias"] for w in weights for n in ("k", "v")])
        if c.qk_norm:
            self.context_norm = torch.stack([w["self_attn.k_norm.weight"] for w in weights])[:, None]  # [L, 1, D]
        self.context_program = self.input_program = self.markov_program = None
        if is_dense(model.fc) and is_dense(self.context_kv) and not (c.qkv_bias or c.qk_norm):
            norm = model.hidden_norm.weight
            self.context_program = ContextProgram(model.fc, norm, self.context_kv, target.rotary, c)
        if self.config.feature_input:
            mask = target.embed(torch.tensor([self.config.mask_token_id], device=target.device))
            self.mask = model.token_norm(mask)  # [1, C]
            if is_dense(model.input_proj):
                norms = model.feature_norm.weight, model.token_norm.weight, self.mask
                self.input_program = BlockInputs(target.embedding, norms, model.input_proj, c.rms_norm_eps)
        self.has_confidence = model.confidence_head is not None
        self.confidence = torch.zeros(c.hidden_size + self.config.markov_rank + 1, device=target.device)
        if model.confidence_head is not None:
            self.confidence = torch.cat([p.flatten() for p in model.confidence_head.parameters()]).float()
        self.copies = None
        if model.copy_head is not None:
            self.copies = CopyBias(model.copy_head, model.t2d)
        if model.markov_head is not None:
            self.w2 = linear_map(model.w2, dtype)  # [R, r] -> [R, V']
            if model.markov_head.kind == "vanilla" and is_dense(self.w2):
                w1 = model.markov_head.markov_w1.weight
                self.markov_program = MarkovProgram(
                    self.block_size, w1, self.w2, self.d2t, self.confidence, self.copies
                )

    @property
    def _caches(self) -> list[Tensor]:
        """Keys and values of the context, a layer each."""
        return self._storage[: len(self.layers)]

    @property
    def _features(self) -> Tensor | None:
        """Fused taps of committed positions [slots, C], where blocks start from them."""
        return self._storage[-1] if self.config.feature_input else None

    @property
    def slot_bytes(self) -> int:
        return super().slot_bytes + (torch.int64.itemsize if self.copies is not None else 0)

    def allocate(self, num_slots: int) -> None:
        super().allocate(num_slots)
        remembered = num_slots if self.copies is not None else 0
        self._history = torch.zeros(remembered, dtype=torch.int64, device=self.target.device)  # tokens

    @torch.inference_mode()
    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        super().copy(source_slot, target_slot, count)
        if self.copies is not None:
            copy_slots([self._history], source_slot, target_slot, count)

    @torch.inference_mode()
    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        c = self.config.decoder
        if self.copies is not None:
            self._history.index_copy_(0, slots, tokens)
        if self.context_program is not None and compiled_cache(self._storage[0]):
            self.context_program(taps, positions, slots, self._caches, self._features)
            return
        fused = self.model.fc(torch.cat(taps, -1))
        if self._features is not None:
            self._features.index_copy_(0, slots, fused.to(self._features.dtype))
        product = self.context_kv(self.model.hidden_norm(fused))
        if self.context_bias is not None:
            product = product + self.context_bias
        kv = product.view(len(positions), len(self.layers), 2, c.num_kv_heads, c.head_dim)
        if self.context_norm is not None:
            keys = kv[:, :, 0]
            keys.copy_(F.rms_norm(keys, (c.head_dim,), eps=c.rms_norm_eps) * self.context_norm)
        for storage, layer_kv in zip(self._caches, kv.unbind(1), strict=True):
            rotate_(layer_kv.flatten(1, 2), c.num_kv_heads, self.target.rotary, positions)
            store(layer_kv, storage, slots)

    @torch.inference_mode()
    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        return self.decode_block(requests, self.backbone(requests, slots))

    def backbone(self, requests: list[DraftRequest], slots: int) -> Tensor:
        """One parallel pass over all blocks of so many slots -> hidden states [R, G, C]."""
        g, device = slots + self.config.num_slots - self.block_size, self.target.device
        anchors = [len(r.token_ids) - 1 for r in requests]
        own = [r.first_slot + anchor for r, anchor in zip(requests, anchors, strict=True)]
        block = [[start + k for start in starts for k in range(g)] for starts in (anchors, own)]
        positions, places = torch.tensor(block, device=device)
        before = [slot - 1 if anchor else -1 for slot, anchor in zip(own, anchors, strict=True)]
        tokens, before = torch.tensor([[r.token_ids[-1] for r in requests], before], device=device)

        segments = [self.segment(r, g, g) for r in requests]
        attention = CachedAttention(self._caches, places, segments, self.config.decoder.group_size)
        hidden, _ = self._stack(self.block_inputs(tokens, before, g), positions, attention)
        return hidden.view(len(requests), g, -1)[:, -slots:]

    def block_inputs(self, tokens: Tensor, before: Tensor, slots: int) -> Tensor:
        """What the first layer gets [R*slots, C], as in training: anchors [R], the places before theirs, or -1."""
        r = len(tokens)
        if self._features is None:
            rows = tokens.new_full((r, slots), self.config.mask_token_id)
            rows[:, 0] = tokens
            return self.target.embed(rows.flatten())
        if self.input_program is not None:
            return self.input_program(self._features, before, tokens, slots)
        feature = self.model.feature_norm(self.features_before(self._features, before))
        token = self.model.token_norm(self.target.embed(tokens))
        pairs = torch.cat([feature.repeat(2, 1), torch.cat([token, self.mask.expand(r, -1)])], -1)
        first, mask = self.model.input_proj(pairs).split(r)
        return torch.stack([first, *[mask] * (slots - 1)], 1).flatten(0, 1)

    def decode_block(self, requests: list[DraftRequest], hidden: Tensor) -> Draft:
        """The sequential head, left to right over hidden [R, G, C], each slot from the token sampled before it."""
        r, g, _ = hidden.shape
        logits = self.logits(hidden.flatten(0, 1)).view(r, g, -1)  # [R, G, V'], without the head's bias
        previous = torch.tensor([q.token_ids[-1] for q in requests], device=hidden.device)
        copied = None if self.copies is None else (self._history, self.copies.spans(requests))
        temperatures = hidden.new_tensor([min(q.params.temperature, 1.0) for q in requests], dtype=torch.float32)
        if self.markov_program is not None:
            greedy = all(q.params.greedy for q in requests)
            sampling = None if greedy else (sampling_rows(requests), torch.from_numpy(self.draws(requests)[:, :g]))
            return self.markov_program(previous, logits, hidden, temperatures, copied, sampling)
        draw = self.sampler(requests)
        slots: list[Slot] = []
        rank = self.config.markov_rank
        embeddings, state = hidden.new_empty(r, g, rank), hidden.new_zeros(r, rank)
        lengths = torch.zeros(r, g, device=hidden.device)
        # The Markov bias decides most later slots: candidates are picked after it, never before.
        for k in range(g):
            if (markov := self.model.markov_head) is not None:
                embeddings[:, k] = markov.markov_w1(previous)
                features, state = markov.step(embeddings[:, k], hidden[:, k], state)
                logits[:, k] += self.w2(features)
            if self.copies is not None and copied is not None:
                lengths[:, k] = self.copies.add_(logits[:, k], *copied, previous, k)
            slots.append(draw(k, logits[:, k]))
            previous = slots[-1].token
        logprobs = logits.log_softmax(-1)
        largest, entropy = logprobs.amax(-1).exp(), -(logprobs.exp() * logprobs).sum(-1)
        evidence = largest, entropy, lengths, temperatures
        return whole_draft(slots, slot_signals(hidden, embeddings, self.confidence, *evidence))
