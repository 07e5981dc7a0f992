"""Tiny random models for tests, and what their output must be, computed in the plainest way.

Shapes: N tokens, T positions, V vocabulary, R requests, G slots of a block.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dspark.drafters.chain import ChainModel
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Model
from dspark.drafters.interface import Drafter, DraftRequest
from dspark.drafters.layers import DrafterConfig, DraftModel
from dspark.drafters.model import DSparkConfig, DSparkModel
from dspark.drafters.mtp import MtpConfig, MtpModel
from dspark.draws import Purpose, uniforms
from dspark.engine.engine import WAITING_PARTS
from dspark.engine.kv_cache import slot_bytes
from dspark.models.config import DecoderConfig
from dspark.models.decoder import Decoder, layer_shapes
from dspark.sampling import SamplingParams, categorical, truncated_probs
from dspark.spec.draft import Draft
from dspark.train.data import Example

AnyModel = TypeVar("AnyModel", bound=DraftModel)


def make_example(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    domain: str = "other",
    earlier: Sequence[tuple[int, int]] = (),
) -> Example:
    """All before the last answer, that answer, and where the answers before it are."""
    length = len(prompt_ids)
    spans = [*earlier, (length, length + len(answer_ids))]
    return Example.of([*prompt_ids, *answer_ids], spans, spans[0][0], domain)


# ---- models


def tiny_config(vocab_size: int = 64, num_layers: int = 4, tie_embeddings: bool = False) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=tie_embeddings,
        max_position_embeddings=256,
    )


def tiny_state_dict(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under Hugging Face names, large enough that every layer moves the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def weight(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return 1 + normal(*shape, scale=0.2)
        return normal(*shape, scale=1.5 / math.sqrt(shape[1]))

    state = {
        "model.embed_tokens.weight": normal(config.vocab_size, config.hidden_size, scale=0.5),
        "model.norm.weight": weight((config.hidden_size,)),
        "lm_head.weight": normal(config.vocab_size, config.hidden_size, scale=0.4),
    }
    if config.tie_embeddings:
        del state["lm_head.weight"]
    for i in range(config.num_layers):
        state |= {f"model.layers.{i}.{name}": weight(shape) for name, shape in layer_shapes(config).items()}
    return state


def tiny_target(
    dtype: torch.dtype = torch.float32, seed: int = 0, vocab_size: int = 64, num_layers: int = 4
) -> Decoder:
    config = tiny_config(vocab_size, num_layers)
    return Decoder(config, tiny_state_dict(config, seed), dtype=dtype)


def tiny_model(
    config: DecoderConfig,
    seed: int = 0,
    block_size: int = 4,
    draft_vocab_size: int = 0,
    num_layers: int = 2,
    markov_rank: int = 6,
    **changes,
) -> DSparkModel:
    """An untrained DSpark drafter whose heads are all of notable size; 0 drafts over the whole vocabulary."""
    size = draft_vocab_size or config.vocab_size
    shape = DSparkConfig(config, tap_layers(config), block_size, size, num_layers, markov_rank, 1, **changes)
    return randomised(DSparkModel, shape, seed)


def tiny_chain(
    kind: str, config: DecoderConfig, seed: int = 0, block_size: int = 4, draft_vocab_size: int = 0, window: int = 0
) -> ChainModel:
    """An untrained EAGLE-3 or MTP drafter."""
    size = draft_vocab_size or config.vocab_size
    if kind == "mtp":
        return randomised(MtpModel, MtpConfig(config, (config.num_layers - 1,), block_size, size, window=window), seed)
    return randomised(Eagle3Model, Eagle3Config(config, tap_layers(config), block_size, size, window=window), seed)


def memory_for(num_slots: int, target: Decoder, drafter: Drafter | None = None) -> float:
    """`EngineConfig.kv_gib` for an arena of exactly so many KV slots, besides what may wait for the drafter."""
    per_slot = slot_bytes(target.config, target.kv_dtype) + (drafter.slot_bytes if drafter is not None else 0)
    waits = drafter is not None and bool(drafter.tap_layers)
    parts = WAITING_PARTS / (WAITING_PARTS - 1) if waits else 1
    return (num_slots + 0.5) * per_slot * parts / 2**30


def tap_layers(config: DecoderConfig) -> tuple[int, ...]:
    return tuple(sorted({0, config.num_layers // 2, config.num_layers - 1}))


def randomised(model_class: type[AnyModel], config: DrafterConfig, seed: int) -> AnyModel:
    """Weights of notable size and a random draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        tokens = torch.randperm(config.decoder.vocab_size, generator=generator)
        model.d2t.copy_(tokens[: config.draft_vocab_size].sort().values)
    return model


def tiny_drafter(
    target: Decoder, seed: int = 0, block_size: int = 4, draft_vocab_size: int = 0, num_layers: int = 2
) -> DSparkDrafter:
    return DSparkDrafter(tiny_model(target.config, seed, block_size, draft_vocab_size, num_layers), target)


def tiny_variant(
    name: str, target: Decoder, window: int = 0, block_size: int = 4, draft_vocab_size: int = 0, seed: int = 0
) -> DraftModel:
    """One of VARIANTS, untrained."""
    shape = {"block_size": block_size, "draft_vocab_size": draft_vocab_size, "window": window, "seed": seed}
    if name in ("eagle3", "mtp"):
        return tiny_chain(name, target.config, **shape)
    changes = {
        "own position": {"own_position": True},
        "feature input": {"feature_input": True},
        "copy head": {"feature_input": True, "copy_length": 3},
    }
    return tiny_model(target.config, **shape, **changes.get(name, {}))


VARIANTS = ("dspark", "own position", "feature input", "copy head", "eagle3", "mtp")


# ---- what the output must be


class PlainAttention:
    """Causal attention of one whole sequence, written out: no cache, no fused kernel."""

    def __init__(self, group_size: int):
        self.group_size = group_size

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        keys, values = (t.repeat_interleave(self.group_size, 1) for t in kv.unbind(1))  # [T, H, D]
        scores = torch.einsum("thd,shd->hts", q, keys) / math.sqrt(q.shape[-1])
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, values).flatten(1)


def plain_logits(target: Decoder, token_ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of a whole sequence."""
    attention = PlainAttention(target.config.group_size)
    tokens = torch.tensor(list(token_ids))
    return target.logits(target.forward(tokens, torch.arange(len(tokens)), attention).hidden)


def plain_greedy(target: Decoder, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy answer, everything recomputed for each token."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(plain_logits(target, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


class PlainTarget:
    """Next-token distributions of a target by prefix, each computed once."""

    def __init__(self, target: Decoder):
        self.target = target
        self._probs: dict[tuple, Tensor] = {}

    def probs(self, prefix: Sequence[int], params: SamplingParams) -> Tensor:
        """[V] after the request's sampling parameters."""
        values = (params.temperature, params.top_k, params.top_p, params.min_p)
        key = (tuple(prefix), values)
        if key not in self._probs:
            logits = plain_logits(self.target, prefix)[-1:]
            self._probs[key] = truncated_probs(logits, *(torch.tensor([v]) for v in values))[0]
        return self._probs[key]


# ---- drafters that know the target


class OracleDrafter:
    """Identical to the target: drafts from the target's own distribution, so that nothing is ever rejected."""

    tap_layers: tuple[int, ...] = ()
    slot_bytes = 0
    has_confidence = True

    def __init__(self, target: Decoder, block_size: int = 4):
        self.block_size, self.plain = block_size, PlainTarget(target)

    def allocate(self, num_slots: int) -> None:
        pass

    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        pass

    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        pass

    def distribution(self, target_probs: Tensor, anchor: int, slot: int) -> Tensor:
        """What slot `slot` after position `anchor` is drafted from, [V]."""
        return target_probs

    def propose(self, requests: list[DraftRequest], slots: int) -> Draft:
        rows: list[Tensor] = []
        tokens: list[int] = []
        for request in requests:
            prefix = list(request.token_ids)
            anchor = len(prefix) - 1
            for slot in range(slots):
                rows.append(self.distribution(self.plain.probs(prefix, request.params), anchor, slot))
                purpose, index = (Purpose.TARGET, 0) if request.coupled else (Purpose.DRAFT, slot)
                draw = uniforms(request.seed, [len(prefix)], purpose, index)
                prefix.append(int(categorical(rows[-1][None], draw)))
            tokens += prefix[anchor + 1 :]
        shape = (len(requests), slots)
        draft_probs = torch.stack(rows).unflatten(0, shape)  # [R, G, V]
        support = torch.arange(draft_probs.shape[-1]).expand(draft_probs.shape)
        lengths = torch.full((len(requests),), slots)
        return Draft(torch.tensor(tokens).view(shape), support, draft_probs, lengths, torch.zeros(*shape, 1))


class AdversarialDrafter(OracleDrafter):
    """Right for 0 to block_size slots, by the anchor's position, then wrong: the target's distribution shifted
    by one token. The probabilities it reports are honest."""

    def distribution(self, target_probs: Tensor, anchor: int, slot: int) -> Tensor:
        return target_probs if slot < anchor % (self.block_size + 1) else target_probs.roll(1)
