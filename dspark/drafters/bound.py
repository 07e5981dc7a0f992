"""What trained drafters share when they serve: their target, per-token storage, and the drawing of slots.

Shapes: R requests, G slots, M candidates, S signals, V' draft vocabulary, C width, r head rank.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from dspark.drafters.interface import DraftRequest
from dspark.drafters.layers import DraftModel, check_fit
from dspark.draws import Purpose, uniforms
from dspark.models.attention import Segment, copy_slots
from dspark.models.decoder import Decoder
from dspark.models.layers import linear_map
from dspark.sampling import categorical, first_maximum
from dspark.spec.draft import Draft

LEAST = torch.finfo(torch.float32).min / 4  # a logit; differences of two are finite
ODDS_EPS = 1e-4  # probabilities are at most 1 less this in log-odds
NUM_CANDIDATES = 64  # tokens a slot is sampled from: the likeliest, after a sequential head's bias if there is one
AnyModel = TypeVar("AnyModel", bound=DraftModel)


def packed(model: AnyModel, target: Decoder) -> AnyModel:
    """A frozen copy where the target is, with the linear maps that are its own, not of parts, made for inference."""
    copied = copy.deepcopy(model).requires_grad_(False).to(target.device, target.compute_dtype)
    for name, child in list(copied.named_children()):
        if isinstance(child, nn.Linear):
            delattr(copied, name)
            setattr(copied, name, linear_map(child.weight, target.dtype))
    return copied


class Slot(NamedTuple):
    """One slot of all blocks: token [R], and what it was drawn from, support and draft_probs [R, M]."""

    token: Tensor
    support: Tensor
    draft_probs: Tensor


def sampling_rows(requests: list[DraftRequest]) -> Tensor:
    """What requests are sampled by: temperature, top-k, top-p and min-p, [R, 4] fp32. A greedy request is one of the
    likeliest token alone, and what is off has a value that truncates nothing."""
    params = [q.params for q in requests]
    rows = [
        (1.0, 1, 1.0, 0.0) if p.greedy else (p.temperature, p.top_k or NUM_CANDIDATES, p.top_p, p.min_p) for p in params
    ]
    tiny = torch.finfo(torch.float32).tiny  # temperature and top-p may have become 0
    return torch.tensor(rows).clamp_(min=torch.tensor([tiny, 1.0, tiny, 0.0]))


def candidate_probs(logits: Tensor, settings: Tensor) -> Tensor:
    """Logits of candidates [R, M], descending, and settings [R, 4] -> their law. Not all tokens that tie with the last
    one kept need be kept, as in `truncated_probs`: nothing depends on it, as long as this is what is drawn from."""
    temperature, top_k, top_p, min_p = settings.T[..., None]
    weights = ((logits - logits[:, :1]) / temperature).exp()
    weights = weights * (torch.arange(weights.shape[1], device=weights.device) < top_k)
    held = weights.cumsum(-1)
    weights = weights * ((held - weights < top_p * held[:, -1:]) & (weights >= min_p))
    return weights / weights.sum(-1, keepdim=True)


class BoundDrafter(ABC):
    """A trained drafter bound to its target, with storage for all running requests.

    Sampling covers each slot's NUM_CANDIDATES likeliest tokens; the verifier gets that very distribution.
    """

    def __init__(self, model: DraftModel, target: Decoder, slot_shapes: list[tuple[int, ...]]):
        """slot_shapes: what is stored for a token. Raises ValueError if the target is of another shape."""
        check_fit(model.config, target.config)
        self.target, self.slot_shapes = target, slot_shapes
        self.block_size: int = model.config.block_size
        self.tap_layers: tuple[int, ...] = model.config.tap_layers
        self.window: int = model.config.window
        self.d2t = model.d2t.to(target.device)
        self.head = linear_map(target.lm_head_weight[self.d2t], target.dtype, reuses_memory=True)
        self._storage: list[Tensor] = []

    has_confidence: bool

    @abstractmethod
    def extend(self, taps: list[Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None: ...

    @abstractmethod
    def propose(self, requests: list[DraftRequest], slots: int) -> Draft: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] -> logits of the draft vocabulary [N, V'], valid until the next call."""
        return self.head(hidden).float()

    @property
    def slot_bytes(self) -> int:
        return sum(map(math.prod, self.slot_shapes)) * self.target.kv_dtype.itemsize

    def allocate(self, num_slots: int) -> None:
        dtype, device = self.target.kv_dtype, self.target.device
        self._storage = [torch.empty((num_slots, *shape), dtype=dtype, device=device) for shape in self.slot_shapes]

    @torch.inference_mode()
    def copy(self, source_slot: int, target_slot: int, count: int) -> None:
        copy_slots(self._storage, source_slot, target_slot, count)

    def features_before(self, features: Tensor, before: Tensor) -> Tensor:
        """Features stored by slot [num_slots, C], those of slots `before` [N], zeros where it is -1, [N, C]."""
        found = features[before.clamp(min=0)].to(self.target.compute_dtype)
        return torch.where(before[:, None] >= 0, found, 0.0)

    def segment(self, request: DraftRequest, rows: int, own: int) -> Segment:
        """`rows` rows that see the context in the window before the anchor and `own` slots from the anchor on."""
        anchor = len(request.token_ids) - 1
        unseen = max(0, anchor - self.window) if self.window else 0
        return Segment(rows, request.first_slot + unseen, anchor - unseen + own, causal=False)

    def sampler(self, requests: list[DraftRequest]) -> Callable[[int, Tensor], Slot]:
        """What draws slot k of all blocks from its logits [R, V'], each by its request's parameters and seed."""
        if all(q.params.greedy for q in requests):
            return lambda k, logits: self.best(logits)
        settings, draws = sampling_rows(requests).to(self.d2t.device), self.draws(requests)
        return lambda k, logits: self.sample(logits, settings, draws[:, k])

    def best(self, logits: Tensor) -> Slot:
        """The likeliest token of each row [R, V'], no randomness."""
        token = self.d2t[first_maximum(logits)]
        return Slot(token, token[:, None], torch.ones_like(logits[:, :1]))

    def sample(self, logits: Tensor, settings: Tensor, draws: ArrayLike) -> Slot:
        """Logits [R, V'], settings [R, 4] and draws [R] -> one token a row, from its likeliest candidates."""
        logits = logits.nan_to_num(nan=LEAST, posinf=-LEAST, neginf=LEAST)  # a broken drafter costs time, no more
        logits, candidates = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]))
        candidates, order = candidates.sort(-1)  # in the target's order a shared draw lands in the same place, mostly
        support, draft_probs = self.d2t[candidates], candidate_probs(logits, settings).gather(-1, order)
        index = categorical(draft_probs, draws)[:, None]
        return Slot(support.gather(1, index).squeeze(1), support, draft_probs)

    def draws(self, requests: list[DraftRequest]) -> NDArray[np.float64]:
        """The uniform [R, G] that samples each slot; the token of slot k lands at anchor position + 1 + k."""
        slots = np.arange(self.block_size)
        seeds, starts = np.array([(q.seed, len(q.token_ids)) for q in requests]).T[..., None]  # [R, 1] each
        draws = uniforms(seeds, starts + slots, Purpose.DRAFT, slots)
        coupled = np.array([[q.coupled] for q in requests])
        if coupled.any():  # the target's own draw for the position
            draws = np.where(coupled, uniforms(seeds, starts + slots, Purpose.TARGET), draws)
        return draws


def slot_signals(
    hidden: Tensor,
    embeddings: Tensor,
    weights: Tensor,
    largest: Tensor,
    entropy: Tensor,
    lengths: Tensor,
    temperatures: Tensor,
) -> Tensor:
    """What tells whether slots are accepted [R, G, 6]: confidence logits and evidence.

    hidden [R, G, C], W1 of the token before each slot [R, G, r] and the confidence head's weights and bias [C + r + 1]
    -> the logits. Evidence, [R, G] each: the largest probability of a slot at temperature 1, its log-odds, the entropy,
    how long a match the copy head saw; and the temperature of each request [R].
    """
    logits = torch.cat([hidden, embeddings], -1).float() @ weights[:-1] + weights[-1]
    odds = largest.logit(ODDS_EPS)
    return torch.stack([logits, largest, odds, entropy, lengths, temperatures[:, None].expand_as(largest)], -1)


def whole_draft(slots: list[Slot], signals: Tensor | None = None) -> Draft:
    """All slots of a round, and their signals [R, G, S], without which they say nothing."""
    tokens, support, draft_probs = (torch.stack(column, 1) for column in zip(*slots, strict=True))
    if signals is None:
        signals = torch.zeros(*tokens.shape, 1, device=tokens.device)
    return Draft(tokens, support, draft_probs, torch.full((len(tokens),), len(slots)), signals)
