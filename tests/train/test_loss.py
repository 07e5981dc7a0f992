"""The fused loss equals the formula written with autograd and full softmaxes, in value and in every gradient.

Shapes: N slots, C width, r rank, V vocabulary, V' draft vocabulary.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dspark.train.loss
from dspark.train.loss import LossWeights, SlotTargets, dspark_loss

N, C, RANK, VOCAB, DRAFT_VOCAB = 10, 6, 3, 15, 11
WEIGHTS = [
    LossWeights(),
    LossWeights(cross_entropy=1, total_variation=0, confidence=0),
    LossWeights(cross_entropy=0, total_variation=1, confidence=0),
    LossWeights(cross_entropy=0, total_variation=0, confidence=1),
    LossWeights(distillation=0.7, decay=2.0),
]


@dataclass
class Case:
    """Inputs of one loss; the target's head covers the whole vocabulary, d2t are the drafted rows of it."""

    hidden: Tensor
    markov: Tensor
    w2: Tensor
    target_head: Tensor
    target_hidden: Tensor
    next_tokens: Tensor
    slots: Tensor
    confidence_logits: Tensor
    d2t: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.markov, self.w2, self.confidence_logits]

    @property
    def head(self) -> Tensor:
        return self.target_head[self.d2t]

    @property
    def labels(self) -> Tensor:
        """Index in the draft vocabulary, -1 outside of it."""
        found = self.next_tokens[:, None] == self.d2t
        return torch.where(found.any(1), found.long().argmax(1), -1)

    def targets(self, decay: float) -> SlotTargets:
        logsumexp = (self.target_hidden @ self.target_head.T).logsumexp(-1)
        return SlotTargets(self.target_hidden, logsumexp, self.labels, self.slots, torch.exp(-self.slots / decay))


def make_case(dtype: torch.dtype = torch.float64, draft_vocab: int = DRAFT_VOCAB) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    next_tokens = torch.randint(0, VOCAB, (N,), generator=generator)
    d2t = torch.randperm(VOCAB, generator=generator)[:draft_vocab].sort().values
    case = Case(
        normal(N, C), normal(N, RANK), normal(draft_vocab, RANK), normal(VOCAB, C), normal(N, C), next_tokens,
        torch.arange(N) % 4, normal(N), d2t,
    )  # fmt: skip
    for parameter in case.parameters:
        parameter.requires_grad_()
    return case


def plain_loss(case: Case, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Design §6, with the draft distribution spread over the whole vocabulary."""
    target_probs = (case.target_hidden @ case.target_head.T).softmax(-1)  # [N, V]
    logits = case.hidden @ case.head.T + case.markov @ case.w2.T
    draft_probs = torch.zeros_like(target_probs).index_copy(1, case.d2t, logits.softmax(-1))  # [N, V]
    w = torch.exp(-case.slots / weights.decay).to(logits.dtype)
    w = w / w.sum()
    inside = case.labels >= 0
    cross_entropy = F.cross_entropy(logits, case.labels.clamp(min=0), reduction="none") * inside
    distillation = -(target_probs[:, case.d2t] * logits.log_softmax(-1)).sum(-1)
    l1 = (draft_probs - target_probs).abs().sum(-1)
    acceptance = (1 - l1 / 2).detach()
    bce = F.binary_cross_entropy_with_logits(case.confidence_logits, acceptance, reduction="none")
    total = weights.cross_entropy * cross_entropy + weights.total_variation * l1 + weights.confidence * bce
    total = total + weights.distillation * distillation
    return (w * total).sum(), acceptance


def fused_loss(case: Case, weights: LossWeights) -> tuple[Tensor, Tensor]:
    return dspark_loss(
        case.hidden, case.markov, case.w2, case.head, case.confidence_logits, case.targets(weights.decay), weights
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 256])
@pytest.mark.parametrize("draft_vocab", [DRAFT_VOCAB, VOCAB])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_equals_plain_autograd(
    chunk_rows: int, draft_vocab: int, weights: LossWeights, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the chunk boundaries, with and without labels outside the draft vocabulary, term by term."""
    monkeypatch.setattr(dspark.train.loss, "CHUNK_ROWS", chunk_rows)
    case = make_case(draft_vocab=draft_vocab)
    assert case.labels.lt(0).any() == (draft_vocab < VOCAB)
    ours, acceptance = fused_loss(case, weights)
    expected, expected_acceptance = plain_loss(case, weights)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(acceptance.double(), expected_acceptance, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(ours, case.parameters, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(expected, case.parameters, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(("hidden", "markov", "w2", "confidence"), ours, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_equals_plain_autograd_in_fp32():
    case = make_case(torch.float32)
    (ours, _), (expected, _) = fused_loss(case, LossWeights()), plain_loss(case, LossWeights())
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, case.parameters), torch.autograd.grad(expected, case.parameters)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_slot_weights_decay_and_are_normalised():
    """Twice the same slots give the same loss; a slot's weight is exp(-k / decay) of the first one's."""
    case = make_case()
    once, _ = fused_loss(case, LossWeights())
    twice = make_case()
    for name in ("hidden", "markov", "target_hidden", "next_tokens", "slots", "confidence_logits"):
        value = getattr(twice, name).detach()
        setattr(twice, name, torch.cat([value, value]))
    torch.testing.assert_close(fused_loss(twice, LossWeights())[0], once, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(fused_loss(case, LossWeights(0, 0, 1))[0], [case.confidence_logits])
    error = torch.sigmoid(case.confidence_logits) - plain_loss(case, LossWeights())[1]
    ratio = (grad / error).detach()
    torch.testing.assert_close(ratio[3] / ratio[0], torch.tensor(math.exp(-3 / 4.0)).double(), atol=1e-5, rtol=0)


def test_the_scalar_carries_the_incoming_gradient():
    """Gradients are computed in the forward pass and must still scale with what comes back."""
    case = make_case()
    single = torch.autograd.grad(fused_loss(case, LossWeights())[0], case.parameters)
    triple = torch.autograd.grad(3 * fused_loss(case, LossWeights())[0], case.parameters)
    for a, b in zip(single, triple):
        torch.testing.assert_close(3 * a, b)


def test_identical_distributions_lose_nothing():
    """A drafter that equals the target has L1 zero and acceptance one, and distillation leaves it where it is."""
    case = make_case(draft_vocab=VOCAB)
    with torch.no_grad():
        case.hidden.copy_(case.target_hidden)
        case.w2.zero_()
    loss, acceptance = fused_loss(case, LossWeights(0, 1, 0))
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert acceptance.min() > 1 - 1e-5
    distilled, _ = fused_loss(case, LossWeights(0, 0, 0, distillation=1.0))
    (grad,) = torch.autograd.grad(distilled, [case.hidden])
    assert grad.abs().max() < 1e-6
