"""From logits to tokens: a request's sampling parameters and its token distribution.

All functions are pure and each row is computed by itself: a request's tokens do not change with what runs beside it.

Shapes: N = rows (tokens to predict), V = vocabulary size, C = candidates looked at.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "SamplingParams",
    "TokenLogprobs",
    "categorical",
    "token_logprobs",
    "truncated_probs",
]


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops. The defaults are greedy decoding.

    Logits pass through these in turn: logit_bias, repetition_penalty, frequency and presence penalty, the ban on
    ends before min_new_tokens (`dspark.penalties`), then temperature, top_k, top_p, min_p (`truncated_probs`).
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # given, the text depends on it alone, but accepted length suffers; else the engine picks
    max_new_tokens: int = 256
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # the token that stops is the answer's last
    presence_penalty: float = 0.0  # off the logit of every generated token (OpenAI)
    frequency_penalty: float = 0.0  # the same, times how often it was generated (OpenAI)
    repetition_penalty: float = 1.0  # divides a positive logit of any token so far, prompt included (Transformers)
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # kept as sorted pairs
    min_new_tokens: int = 0  # no end token, stop id or stop string before so many tokens
    stop: tuple[str, ...] = ()  # the text ends before the first of these; needs a tokenizer, so not for a bare Engine
    n: int = 1  # answers to the prompt, each with a seed of its own; `LLM.generate` reads it, the engine does not
    logprobs: int | None = None  # how many of the likeliest tokens to report beside the chosen one; None: no report

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # frozen, and hashable only if lists and dicts become tuples

        keep("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        keep("stop_token_ids", tuple(self.stop_token_ids))
        keep("logit_bias", tuple(sorted(dict(self.logit_bias).items())))

        def check(name: str, good: bool, rule: str) -> None:  # comparisons with NaN are never good
            if not good:
                raise ValueError(f"{name} must {rule}, got {getattr(self, name)}.")

        # Within these bounds nothing becomes infinite in fp32, whatever the logits are.
        check("temperature", 0 <= self.temperature <= 1e30, "be from 0 to 1e30")
        check("top_k", 0 <= self.top_k < 2**31, "be at least 0 (0 turns it off) and below 2^31")
        check("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1 (1 turns it off)")
        check("min_p", 0 <= self.min_p < 1, "be at least 0 (0 turns it off) and below 1")
        check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "fit a signed 64-bit integer")
        check("max_new_tokens", self.max_new_tokens >= 1, "be at least 1")
        longest = self.max_new_tokens
        check("min_new_tokens", 0 <= self.min_new_tokens <= longest, f"be from 0 to max_new_tokens={longest}")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, -2 <= getattr(self, name) <= 2, "be from -2 to 2 (0 turns it off)")
        check("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "be from 0.001 to 1000 (1 turns it off)")
        for token, bias in self.biases.items():
            if not (token >= 0 and -100 <= bias <= 100):
                raise ValueError(f"logit_bias must map token ids to numbers from -100 to 100, got {token}: {bias}.")
        check("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "be token ids")
        if not all(self.stop):
            raise ValueError("stop must hold no empty text, which would stop every answer before it begins.")
        check("n", self.n >= 1, "be at least 1")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "be from 0 to 20")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def biases(self) -> dict[int, float]:
        return dict(self.logit_bias)

    @property
    def penalises(self) -> bool:
        """Whether tokens that came before change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def adjusts_logits(self) -> bool:
        """Whether `dspark.penalties.adjusted_logits` has anything to do."""
        return self.penalises or len(self.logit_bias) > 0 or self.min_new_tokens > 0


# ---- logits to probabilities


def relative_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp((logit - the row's best) / temperature), in place: logits [N, V] in fp32 or fp64, temperature [N] above 0."""
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature[:, None])
    least = least_exponent(logits.dtype)
    return torch.threshold_(logits.clamp_(min=least - 1).exp_(), math.exp(least), 0.0)


def least_exponent(dtype: torch.dtype) -> float:
    """Weights below its exponential are 0: `exp` would be ten times as slow where results are denormal."""
    return math.log(torch.finfo(dtype).tiny) + 17


def truncated_probs(
    logits: Tensor, temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike, min_p: ArrayLike
) -> Tensor:
    """The distribution each row is really sampled from: logits [N, V], parameters [N] -> probs [N, V].

    Filters come in the order Transformers applies them: temperature, top-k, top-p (on what top-k left,
    renormalised), min-p. A row at temperature 0 is the one-hot of its first maximum. Tokens that tie with the
    last one kept are kept too, so that the result does not depend on a sorting order. Float64 logits give
    float64 probabilities, others float32.
    """
    dtype, vocab = torch.promote_types(logits.dtype, torch.float32), logits.shape[-1]
    given = np.array([temperature, top_k, top_p, min_p], np.float64)[..., None]  # [4, N, 1]
    temperature, top_k, top_p, min_p = (torch.from_numpy(values).to(dtype).to(logits.device) for values in given)
    greedy = temperature == 0
    # Probability relative to the row's best token, whose weight is 1. Each filter is a floor for the weight.
    weights = relative_weights(logits.to(dtype, copy=True), temperature.masked_fill(greedy, 1.0).squeeze(-1))
    floor = min_p
    if ((given[1] > 0) | (given[2] < 1)).any():
        ranked = _descending(weights)
        by_count = ranked.gather(-1, torch.where(top_k > 0, top_k - 1, vocab).clamp(max=vocab - 1).long())
        ranked = ranked.masked_fill(ranked < by_count, 0.0)
        held = ranked.cumsum(-1)
        before = pad(held[:, :-1], (1, 0))  # held by the likelier tokens
        inside = (before < top_p * held[:, -1:]).sum(-1, keepdim=True)
        last = inside.clamp(min=1) - 1  # the best token stays even if top_p rounds to 0
        by_mass = ranked.gather(-1, last).where(top_p < 1, 0.0)
        floor = floor.maximum(by_count).maximum(by_mass)
    weights.masked_fill_(weights < floor, 0.0)
    probs = weights.div_(weights.sum(-1, keepdim=True))
    if bool(greedy.any()):
        best = torch.zeros_like(probs).scatter_(-1, first_maximum(logits)[:, None], 1.0)
        probs = torch.where(greedy, best, probs)
    return probs


def _descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # NumPy sorts many times as fast
        return torch.from_numpy(np.sort(values.numpy(), -1)).flip(-1)
    return values.sort(-1, descending=True).values


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the target's own probabilities at one position."""

    logprob: float  # of the token that was chosen
    top: dict[int, float]  # token id -> logprob, the likeliest first


def token_logprobs(logits: Tensor, tokens: list[int], top: int) -> list[TokenLogprobs]:
    """What row i says of tokens[i] and of its `top` likeliest tokens: logits [N, V].

    As in OpenAI's API it is the model's own distribution, before bias, penalties, temperature and truncation.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # [N, V]
    chosen = logprobs[torch.arange(len(tokens)), tokens].tolist()
    values, ids = (t.tolist() for t in logprobs.topk(min(top, logits.shape[-1])))
    return [TokenLogprobs(own, dict(zip(*likeliest))) for own, likeliest in zip(chosen, zip(ids, values))]


# ---- probabilities to tokens


def categorical(probs: Tensor, u: ArrayLike) -> Tensor:
    """Draw one id per row by inverting the CDF: probs [N, V], u [N] in [0, 1) -> ids [N].

    Rows need a positive sum but need not be normalised. An id of probability 0 is never returned: its
    cumulative sum equals the one before it, and the first sum above the threshold is taken.
    """
    rows, draws = np.arange(len(probs)), np.asarray(u, np.float64)
    block = np.zeros_like(rows)
    if probs.shape[-1] > BLOCK:
        # First the block of the vocabulary, then the id in it: two short cumulative sums instead of one over all of it.
        blocks = _blocks(probs, 0.0)
        held = _cumulative(blocks.sum(-1))  # [N, V / BLOCK]
        threshold = draws * held[:, -1]
        block = _first_above(held, threshold)
        threshold -= np.where(block > 0, held[rows, block - 1], 0.0)
        index = torch.from_numpy(rows * blocks.shape[1] + block).to(probs.device)
        inside = _cumulative(blocks.flatten(0, 1).index_select(0, index))
    else:
        inside = _cumulative(probs)
        threshold = draws * inside[:, -1]
    ids = (block * BLOCK + _first_above(inside, threshold)).clip(max=probs.shape[-1] - 1)
    return torch.from_numpy(ids).to(probs.device)


BLOCK = 256


def _blocks(rows: Tensor, filler: float) -> Tensor:
    """[N, V] -> [N, V / BLOCK, BLOCK], a view where V allows it."""
    missing = -rows.shape[-1] % BLOCK
    return (pad(rows, (0, missing), value=filler) if missing else rows).unflatten(-1, (-1, BLOCK))


def _cumulative(values: Tensor) -> NDArray[np.float64]:
    """Along rows, on the host, where so few numbers are summed faster than an operation is called on a device."""
    return values.cpu().numpy().cumsum(-1, dtype=np.float64)


def _first_above(cumulative: NDArray[np.float64], threshold: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index [N] of the first sum [N, C] above the threshold [N], which rounding may have left out of their range.

    Of sums that are NaN it is some index.
    """
    total = cumulative[:, -1]
    threshold = np.minimum(np.maximum(threshold, 0), np.nextafter(total, 0))
    return (cumulative <= threshold[:, None]).sum(-1).clip(max=cumulative.shape[-1] - 1)


def first_maximum(values: Tensor) -> Tensor:
    """`argmax(-1)` that takes the first of equals, [N, V] -> [N]; in two steps it is eight times as fast on a CPU."""
    blocks = _blocks(values, -torch.inf)
    block = blocks.amax(-1).argmax(-1)  # [N]; of few numbers argmax takes the first
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].argmax(-1)
    return block * BLOCK + inside
