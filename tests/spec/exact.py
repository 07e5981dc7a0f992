"""The exact law of speculative decoding's output, by enumeration in float64.

Targets and drafters are tables over a tiny vocabulary. `joint_law` walks through every draft, every choice of
verify lengths, every acceptance, residual and bonus token, round after round, with the package's own
`likelihood_ratios`, `ending_probs` and `residual_weights`; `target_law` is what the output must follow.

`choose_lengths` is the prefix scheduler. It is shown everything, the drafted tokens too, so that one that
uses what it must not can be caught, and it returns the probability of each choice.

`scheduled` runs the package's own scheduler classes this way.

Shapes: V = vocabulary size, M = support of a draft distribution.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product, takewhile
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.spec.calibration import Calibrator
from dspark.spec.prefix_scheduler import PrefixScheduler
from dspark.spec.verify import ending_probs, likelihood_ratios, residual_weights
from dspark.spec.walk import Load

Tokens = tuple[int, ...]
Target = Callable[[Tokens], Tensor]  # prefix -> target_probs [V]
Drafter = Callable[[Tokens, Tokens], tuple[Tensor, Tensor]]  # prefix, block so far -> support, draft_probs [M]
Confidence = Callable[[Tokens, Tokens], float]  # prefix, block so far -> confidence of the slot after it
Confidences = tuple[tuple[float, ...], ...]  # by request, by slot
Law = Mapping[tuple[Tokens, ...], float]  # the output of each request -> probability


@dataclass(frozen=True)
class Request:
    target: Target
    drafter: Drafter
    claimed: Drafter | None = None  # what the verifier is told the drafter is; None: the truth
    confidence: Confidence = lambda prefix, block: 1.0


def ratios_of_rows(target_probs: Tensor, tokens: Tensor, support: Tensor, draft_probs: Tensor) -> Tensor:
    """`likelihood_ratios` from whole rows [N, V]."""
    target_prob = target_probs.gather(-1, tokens[:, None]).squeeze(-1)
    return torch.from_numpy(likelihood_ratios(*(t.numpy() for t in (target_prob, tokens, support, draft_probs))))


def ending_of_rows(target_probs: Tensor, support: Tensor, draft_probs: Tensor, prefix_probs: Tensor) -> Tensor:
    """`ending_probs` from whole rows [N, V]."""
    on_support = target_probs.gather(-1, support)
    return torch.from_numpy(ending_probs(*(t.numpy() for t in (on_support, draft_probs, prefix_probs))))


@dataclass(frozen=True)
class Rules:
    """The verifier's three formulas; wrong ones go here to see them caught."""

    ratios: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = ratios_of_rows
    ending: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = ending_of_rows
    residual: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = residual_weights


class Round(NamedTuple):
    """What exists when verify lengths are chosen, for the requests that still run."""

    requests: tuple[int, ...]
    tokens: tuple[Tokens, ...]  # the draft
    confidences: Confidences
    past: tuple  # what `joint_law: remember` kept of each earlier round, the latest first


class Ended(NamedTuple):
    """A round that is over, for the requests that ran in it."""

    requests: tuple[int, ...]
    confidences: Confidences
    lengths: tuple[int, ...]  # verified
    accepted: tuple[int, ...]  # of these


ChooseLengths = Callable[[Round], Mapping[tuple[int, ...], float]]


def joint_law(
    requests: list[Request],
    gamma: int,
    choose_lengths: ChooseLengths,
    num_tokens: int,
    rules: Rules = Rules(),
    memory: int = 0,  # how many past rounds choose_lengths sees
    remember: Callable[[Ended], Hashable] = lambda ended: (ended.requests, ended.confidences),
) -> Law:
    """The joint law of the first num_tokens output tokens of all requests, which are decoded together."""
    enumerations = [_Enumeration(request, gamma, rules) for request in requests]
    # (outputs, past rounds) -> probability, by the number of tokens out. Each round adds some, so when a
    # state's turn comes, all that leads to it has been played.
    states: list[dict] = [defaultdict(float) for _ in range(num_tokens * len(requests) + 1)]
    states[0][((),) * len(requests), ()] = 1.0
    for running in states[:-1]:
        for (outputs, past), reached in running.items():
            for after, ended, chance in _play(enumerations, outputs, past, choose_lengths, num_tokens):
                seen = (remember(ended), *past)[:memory] if memory else ()
                states[sum(map(len, after))][after, seen] += reached * chance
    law = defaultdict(float)
    for (outputs, _), reached in states[-1].items():
        law[outputs] += reached
    return law


def _play(
    enumerations: list["_Enumeration"],
    outputs: tuple[Tokens, ...],
    past: tuple,
    choose_lengths: ChooseLengths,
    num_tokens: int,
) -> Iterator[tuple[tuple[Tokens, ...], Ended, float]]:
    """Everything one round can do: outputs after it, what happened, probability."""
    active = tuple(r for r, output in enumerate(outputs) if len(output) < num_tokens)
    for drafts in product(*(enumerations[r].drafts(outputs[r]) for r in active)):
        tokens = tuple(draft.tokens for draft in drafts)
        confidences = tuple(draft.confidences for draft in drafts)
        drafted = prod(draft.probability for draft in drafts)
        for lengths, chosen in choose_lengths(Round(active, tokens, confidences, past)).items():
            ends = [enumerations[r].ends(outputs[r], x, n) for r, x, n in zip(active, tokens, lengths, strict=True)]
            for end in product(*ends):
                after = list(outputs)
                for r, (committed, _) in zip(active, end, strict=True):
                    after[r] = (outputs[r] + committed)[:num_tokens]
                ended = Ended(active, confidences, lengths, tuple(len(committed) - 1 for committed, _ in end))
                yield tuple(after), ended, drafted * chosen * prod(chance for _, chance in end)


class _Slot(NamedTuple):
    target_probs: Tensor  # [V]
    sampled_from: list[float]  # [V]
    support: Tensor  # [M]
    draft_probs: Tensor  # [M], as the verifier is told
    ratios: list[float]  # [V]: p(x) / q(x)


class _DraftPath(NamedTuple):
    tokens: Tokens
    confidences: tuple[float, ...]
    probability: float


class _Enumeration:
    """All that can happen to one request in one round."""

    def __init__(self, request: Request, gamma: int, rules: Rules):
        self.request, self.gamma, self.rules = request, gamma, rules
        self.slot = cache(self.slot)
        self.drafts = cache(self.drafts)
        self.ends = cache(self.ends)

    def slot(self, prefix: Tokens, block: Tokens) -> _Slot:
        """The slot after `block`, from the functions under test: a row for each token that may be drafted."""
        target_probs = self.request.target(prefix + block)
        vocab = len(target_probs)
        support, draft_probs = self.request.drafter(prefix, block)
        real = torch.zeros(vocab, dtype=torch.float64).scatter_add(0, support, draft_probs)
        support, draft_probs = (self.request.claimed or self.request.drafter)(prefix, block)
        rows = target_probs.expand(vocab, -1), support.expand(vocab, -1), draft_probs.expand(vocab, -1)
        ratios = self.rules.ratios(rows[0], torch.arange(vocab), rows[1], rows[2])
        return _Slot(target_probs, real.tolist(), support, draft_probs, ratios.tolist())

    def drafts(self, prefix: Tokens) -> list[_DraftPath]:
        paths = [_DraftPath((), (), 1.0)]
        for _ in range(self.gamma):
            paths = [
                _DraftPath(
                    (*path.tokens, token),
                    (*path.confidences, self.request.confidence(prefix, path.tokens)),
                    path.probability * draft_prob,
                )
                for path in paths
                for token, draft_prob in enumerate(self.slot(prefix, path.tokens).sampled_from)
                if draft_prob > 0
            ]
        return paths

    def ends(self, prefix: Tokens, tokens: Tokens, verify_length: int) -> list[tuple[Tokens, float]]:
        """The tokens a round may commit, with probabilities, once its draft and verify length are known."""
        prefix_probs = [1.0]
        for k in range(verify_length):
            ratio = self.slot(prefix, tokens[:k]).ratios[tokens[k]]
            prefix_probs.append(min(prefix_probs[k] * ratio, 1.0))
        ends = []
        ends_earlier = 1.0
        for k in reversed(range(verify_length + 1)):
            slot = self.slot(prefix, tokens[:k])
            draft_probs = slot.draft_probs if k < verify_length else torch.zeros_like(slot.draft_probs)
            kept = torch.tensor([prefix_probs[k]], dtype=torch.float64)
            row = slot.target_probs[None], slot.support[None], draft_probs[None], kept
            ending = float(self.rules.ending(*row)) if k else 1.0
            weights = self.rules.residual(*row)[0]
            law = (weights / weights.sum()).tolist()
            ends += [((*tokens[:k], token), ends_earlier * ending * prob) for token, prob in enumerate(law)]
            ends_earlier *= 1 - ending
        return [end for end in ends if end[1] > 0]


def target_law(requests: list[Request], num_tokens: int) -> Law:
    """What the output must follow: each request's target alone, requests independent."""

    def continuations(target: Target) -> list[tuple[Tokens, float]]:
        paths: list[tuple[Tokens, float]] = [((), 1.0)]
        for _ in range(num_tokens):
            paths = [
                ((*prefix, token), chance * prob)
                for prefix, chance in paths
                for token, prob in enumerate(target(prefix).tolist())
                if prob > 0
            ]
        return paths

    joint = product(*(continuations(request.target) for request in requests))
    return {tuple(output for output, _ in paths): prod(chance for _, chance in paths) for paths in joint}


def total_variation(law: Law, other: Law) -> float:
    return sum(abs(law.get(key, 0.0) - other.get(key, 0.0)) for key in law.keys() | other.keys()) / 2


# ---- tables: every entry is drawn from its own key, so the order of look-ups does not matter


def _random_probs(key: list[int], size: int, zeros: int) -> Tensor:
    generator = np.random.default_rng(key)
    probs = generator.dirichlet(np.full(size, 0.7))
    probs[generator.permutation(size)[:zeros]] = 0
    return torch.from_numpy(probs / probs.sum())


def random_target(seed: int, vocab: int, zeros: int = 0) -> Target:
    """A different distribution after every prefix; `zeros` tokens are impossible in each."""
    return cache(lambda prefix: _random_probs([seed, 0, len(prefix), *prefix], vocab, zeros))


def random_drafter(seed: int, vocab: int, zeros: int = 0, support_size: int | None = None) -> Drafter:
    """Depends on the prefix and on its own block; its support is shuffled and ends in an entry of padding."""

    @cache
    def drafter(prefix: Tokens, block: Tokens) -> tuple[Tensor, Tensor]:
        key = [seed, 1, len(prefix), *prefix, len(block), *block]
        support = np.random.default_rng([*key, 2]).permutation(vocab)[: support_size or vocab]
        draft_probs = _random_probs(key, len(support), zeros)
        return torch.from_numpy(np.append(support, support[0])), torch.nn.functional.pad(draft_probs, (0, 1))

    return drafter


def perfect_drafter(target: Target) -> Drafter:
    return lambda prefix, block: (torch.arange(len(target(()))), target(prefix + block))


def adversarial_drafter(target: Target) -> Drafter:
    """Likes most what the target likes least."""

    def drafter(prefix: Tokens, block: Tokens) -> tuple[Tensor, Tensor]:
        order = target(prefix + block).argsort()
        return order, target(prefix + block)[order].flip(0)

    return drafter


def certain_drafter(seed: int, vocab: int) -> Drafter:
    """One token, no randomness, as greedy or n-gram drafting."""
    return random_drafter(seed, vocab, support_size=1)


def random_confidence(seed: int) -> Confidence:
    """Depends on the prefix and the tokens before the slot, as the confidence head's does."""
    return cache(lambda prefix, block: np.random.default_rng([seed, 3, len(prefix), *prefix, 9, *block]).random())


# ---- ways to choose verify lengths


def fixed_length(length: int) -> ChooseLengths:
    return lambda round: {(length,) * len(round.tokens): 1.0}


def drawn_beforehand(gamma: int) -> ChooseLengths:
    """Each request's length is uniform on 0..gamma, drawn without a look at the draft."""

    def choose(round: Round) -> Mapping[tuple[int, ...], float]:
        lengths = list(product(range(gamma + 1), repeat=len(round.tokens)))
        return dict.fromkeys(lengths, 1 / len(lengths))

    return choose


def threshold(least: float) -> ChooseLengths:
    """Up to the first slot that is not confident enough: uses the tokens before a slot, never its own."""

    def choose(round: Round) -> Mapping[tuple[int, ...], float]:
        return {tuple(len(list(takewhile(least.__le__, slots))) for slots in round.confidences): 1.0}

    return choose


def scheduled(
    make: Callable[[], PrefixScheduler],
    calibrator: Callable[[], Calibrator] | None = None,
    other_tokens: int = 0,
) -> ChooseLengths:
    """The real scheduler, in the state in which the remembered rounds leave it.

    Without a calibrator `remember` is to keep requests and confidences, with one the whole `Ended`; `memory` every
    round.
    """

    def play(
        state: "_State", requests: tuple[int, ...], confidences: Confidences, accepted: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """One round; it goes into the calibrator's state once it is known what was accepted."""
        load = Load(requests, other_tokens)
        drafted = state.scheduler.to_draft(load)
        if not drafted:
            return (0,) * len(confidences)
        slots = state.scheduler.slots_to_draft(load)
        confidence = np.array(confidences)[:, :slots]
        signals = torch.from_numpy(confidence).logit()[..., None]
        if state.calibrator is not None:
            confidence = state.calibrator.confidence(signals)
        lengths = np.zeros(len(confidences), np.int64)
        lengths[drafted] = confidence.shape[1]
        chosen = state.scheduler.choose(confidence, lengths, load)
        if state.calibrator is not None and accepted is not None:
            state.calibrator.observe(signals, torch.from_numpy(chosen), torch.tensor(accepted))
        return tuple(chosen.tolist())

    @cache
    def after(past: tuple) -> "_State":
        if not past:
            return _State(make(), calibrator() if calibrator is not None else None)
        state = deepcopy(after(past[1:]))
        if calibrator is None:
            requests, confidences = past[0]
            play(state, requests, confidences, None)
        else:
            ended = past[0]
            lengths = play(state, ended.requests, ended.confidences, ended.accepted)
            assert lengths == ended.lengths, "a replayed round must go as it went"
        return state

    @cache
    def lengths(past: tuple, requests: tuple[int, ...], confidences: Confidences) -> tuple[int, ...]:
        return play(deepcopy(after(past)), requests, confidences, None)

    return lambda round: {lengths(round.past, round.requests, round.confidences): 1.0}


class _State(NamedTuple):
    scheduler: PrefixScheduler
    calibrator: Calibrator | None
