"""The fused loss equals the formula written with autograd and full softmaxes, in value and in every gradient.

Shapes: N slots, C width, r rank, V vocabulary, V' draft vocabulary.
"""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dspark.train.loss
from dspark.models.decoder import Decoder
from dspark.train.config import TrainConfig
from dspark.train.loss import LossWeights, SlotTargets, dspark_loss
from dspark.train.trainer import Trainer
from tests.tiny import make_example, tiny_config, tiny_model, tiny_state_dict

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
    copied: Tensor
    copy_bias: Tensor
    d2t: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.markov, self.w2, self.confidence_logits, self.copy_bias]

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
        return SlotTargets(self.target_hidden, logsumexp, self.labels, torch.exp(-self.slots / decay))


def make_case(dtype: torch.dtype = torch.float64, draft_vocab: int = DRAFT_VOCAB, rank: int = RANK) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    next_tokens = torch.randint(0, VOCAB, (N,), generator=generator)
    d2t = torch.randperm(VOCAB, generator=generator)[:draft_vocab].sort().values
    case = Case(
        normal(N, C), normal(N, rank), normal(draft_vocab, rank), normal(VOCAB, C), normal(N, C), next_tokens,
        torch.arange(N) % 4, normal(N), torch.randint(0, draft_vocab, (N,), generator=generator), normal(N), d2t,
    )  # fmt: skip
    for parameter in case.parameters:
        parameter.requires_grad_()
    return case


def plain_loss(case: Case, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Design §6, with the draft distribution spread over the whole vocabulary."""
    target_probs = (case.target_hidden @ case.target_head.T).softmax(-1)  # [N, V]
    logits = case.hidden @ case.head.T + case.markov @ case.w2.T
    logits = logits.scatter_add(1, case.copied[:, None], case.copy_bias[:, None])
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
    rows = case.hidden, case.markov, case.w2, case.head, case.confidence_logits, case.targets(weights.decay)
    return dspark_loss(*rows, weights, copies=(case.copied, case.copy_bias))


def assert_same(case: Case, ours: Tensor, expected: Tensor, atol: float = 1e-6, rtol: float = 1e-5) -> None:
    """The same value and the same gradient of every parameter."""
    torch.testing.assert_close(ours.double(), expected.double(), atol=atol, rtol=rtol)
    a, b = (
        torch.autograd.grad(x, case.parameters, allow_unused=True, materialize_grads=True) for x in (ours, expected)
    )
    for name, of_ours, of_expected in zip(("hidden", "markov", "w2", "confidence", "copies"), a, b):
        torch.testing.assert_close(of_ours, of_expected, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_rows, tile_rows", [(1, 1), (3, 2), (4, 4), (10, 3), (256, 16)])
@pytest.mark.parametrize("draft_vocab", [DRAFT_VOCAB, VOCAB])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_equals_plain_autograd(
    chunk_rows: int, tile_rows: int, draft_vocab: int, weights: LossWeights, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the boundaries of chunks and tiles, with and without labels outside the draft vocabulary, term by
    term."""
    monkeypatch.setattr(dspark.train.loss, "CHUNK_BYTES", chunk_rows * draft_vocab * 8)
    monkeypatch.setattr(dspark.train.loss, "TILE_BYTES", tile_rows * draft_vocab * 4)
    case = make_case(draft_vocab=draft_vocab)
    assert case.labels.lt(0).any() == (draft_vocab < VOCAB)
    (ours, acceptance), (expected, expected_acceptance) = fused_loss(case, weights), plain_loss(case, weights)
    torch.testing.assert_close(acceptance.double(), expected_acceptance, atol=1e-6, rtol=1e-6)
    assert_same(case, ours, expected)


def test_a_vocabulary_wider_than_a_chunk_is_computed_row_by_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dspark.train.loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(dspark.train.loss, "TILE_BYTES", 1)
    case = make_case()
    assert_same(case, fused_loss(case, LossWeights())[0], plain_loss(case, LossWeights())[0])


def test_without_a_sequential_head():
    """DFlash: markov features of rank 0 and no confidence."""
    case, weights = make_case(rank=0), LossWeights(1, 0.3, 0, distillation=0.5)
    with torch.no_grad():
        case.copy_bias.zero_()
    ours, _ = dspark_loss(case.hidden, case.markov, case.w2, case.head, None, case.targets(weights.decay), weights)
    case.copy_bias = torch.zeros_like(case.copy_bias, requires_grad=True)  # no copies, no gradient
    assert_same(case, ours, plain_loss(replace(case, copy_bias=case.copy_bias.detach()), weights)[0])


def test_no_label_inside_the_draft_vocabulary():
    """Cross-entropy to the labels is then silent; the other terms are not."""
    case = make_case()
    outside = torch.tensor([i for i in range(VOCAB) if i not in case.d2t])
    case.next_tokens = outside[case.next_tokens % len(outside)]
    assert case.labels.max() == -1
    weights = LossWeights(distillation=0.7)
    assert_same(case, fused_loss(case, weights)[0], plain_loss(case, weights)[0])


def test_products_in_bf16_stay_within_their_rounding():
    """A bf16 head: logits and their gradients are rounded to 8 bits, sums and softmaxes are not."""
    case, weights = make_case(torch.float32), LossWeights(distillation=1.0)
    with torch.no_grad():
        for t in (case.hidden, case.markov, case.w2, case.target_hidden, case.target_head):
            t.copy_(t.bfloat16())
    ours, _ = dspark_loss(
        case.hidden, case.markov, case.w2, case.head.bfloat16(), case.confidence_logits,
        case.targets(weights.decay), weights, copies=(case.copied, case.copy_bias),
    )  # fmt: skip
    assert_same(case, ours, plain_loss(case, weights)[0], atol=2e-2, rtol=2e-2)


def test_equals_plain_autograd_in_fp32():
    case = make_case(torch.float32)
    ours, expected = fused_loss(case, LossWeights())[0], plain_loss(case, LossWeights())[0]
    assert_same(case, ours, expected, atol=1e-5, rtol=1e-4)


def test_slot_weights_decay_and_are_normalised():
    """Twice the same slots give the same loss; a slot's weight is exp(-k / decay) of the first one's."""
    case = make_case()
    once, _ = fused_loss(case, LossWeights())
    twice = make_case()
    rows = ("hidden", "markov", "target_hidden", "next_tokens", "slots", "confidence_logits", "copied", "copy_bias")
    for name in rows:
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
        case.copy_bias.zero_()
    loss, acceptance = fused_loss(case, LossWeights(0, 1, 0))
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert acceptance.min() > 1 - 1e-5
    distilled, _ = fused_loss(case, LossWeights(0, 0, 0, distillation=1.0))
    (grad,) = torch.autograd.grad(distilled, [case.hidden])
    assert grad.abs().max() < 1e-6


BIG_STEP = """
from tests.train.test_loss import peak_of_a_step
print(*peak_of_a_step(150_000, 512, 7))
"""


def peak_of_a_step(vocab_size: int, anchors: int, block_size: int) -> tuple[int, int]:
    """(slots, bytes that the process grew by at its peak) of a training step with a toy backbone. Linux only."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    shape = replace(tiny_config(vocab_size, 2), hidden_size=64, head_dim=16, max_position_embeddings=1024)
    target = Decoder(shape, tiny_state_dict(shape))
    model = tiny_model(shape, block_size=block_size)
    ids = torch.randint(0, vocab_size, (anchors + block_size,), generator=torch.Generator().manual_seed(0)).tolist()
    example = make_example(tuple(ids[:1]), tuple(ids[1:]))
    trainer = Trainer(model, target, [example], [], TrainConfig(anchors_per_sequence=anchors))
    before = status("VmRSS")
    slots = trainer.step([0]).slots
    return slots, status("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_positions_times_vocabulary():
    """512 anchors of 7 slots over 150,000 tokens: not even one bf16 tensor of all logits would fit."""
    run = subprocess.run([sys.executable, "-c", BIG_STEP], capture_output=True, text=True, check=True)
    slots, grown = map(int, run.stdout.split())
    assert slots > 3500
    assert grown < 2 * slots * 150_000
