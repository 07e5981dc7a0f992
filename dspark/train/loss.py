"""The training loss (design §6), fused: products, softmaxes and gradients one chunk of rows at a time.

Nothing of size rows x vocabulary outlives its chunk, so memory does not grow with the batch.
Shapes: N supervised slots, C width, r head rank, V' draft vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 256  # rows of logits alive at once: 256 x 8,192 fp32 stay within a CPU's last-level cache


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms and the decay of slot weights w_k = exp(-k / decay).

    `distillation` weighs a term of our own: the cross-entropy against the target's whole distribution. Its
    gradient, draft_probs - target_probs, is the mean of what sampled labels give, so short runs learn faster.
    """

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    distillation: float = 0.0


class DistributionLoss(torch.autograd.Function):
    """Weighted sums of CE(x*), CE(target_probs) and ||draft_probs - target_probs||_1 over N rows.

    Gradients are in closed form and computed on the way forward.

    The target's distribution is rebuilt from its last hidden state; tokens outside the draft vocabulary
    have draft probability 0, so they add their target probability to the L1 distance and no gradient.
    Forward returns (loss scalar, l1 [N]); only the scalar is differentiable.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # [N, C] draft hidden states
        markov: Tensor,  # [N, r] features of the sequential head
        w2: Tensor,  # [V', r]
        head: Tensor,  # [V', C] frozen LM head rows of the draft vocabulary
        target_hidden: Tensor,  # [N, C] after the final norm
        target_logsumexp: Tensor,  # [N] over the whole vocabulary
        labels: Tensor,  # [N] draft-vocabulary index of x*, -1 where x* is outside of it
        row_weights: Tensor,  # [N]
        ce_weight: float,
        l1_weight: float,
        distillation_weight: float,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden, grad_markov, grad_w2 = (
            torch.empty_like(hidden),
            torch.empty_like(markov),
            torch.zeros_like(w2),
        )
        row_loss, l1 = torch.empty_like(target_logsumexp), torch.empty_like(target_logsumexp)
        # Products run in the precision of the frozen head, everything else in fp32.
        hidden, markov, w2, target_hidden = (t.to(head.dtype) for t in (hidden, markov, w2, target_hidden))
        for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK_ROWS):
            i = slice(int(rows[0]), int(rows[-1]) + 1)
            target_probs = (target_hidden[i] @ head.T).float().sub_(target_logsumexp[i, None]).exp_()  # [n, V']
            inside = target_probs.sum(-1)
            draft_logits = (hidden[i] @ head.T).float().add_(markov[i] @ w2.T)
            label = labels[i, None].clamp(min=0)
            in_vocab = (labels[i] >= 0).float()
            draft_logsumexp = draft_logits.logsumexp(-1)
            cross_entropy = (draft_logsumexp - draft_logits.gather(1, label).squeeze(1)) * in_vocab
            distillation = draft_logsumexp * inside - torch.linalg.vecdot(target_probs, draft_logits)
            draft_probs = draft_logits.sub_(draft_logsumexp[:, None]).exp_()
            difference = draft_probs - target_probs
            l1[i] = difference.abs().sum(-1) + (1 - inside).clamp_(min=0)
            row_loss[i] = ce_weight * cross_entropy + distillation_weight * distillation + l1_weight * l1[i]
            # d CE(x*) = q - onehot;  d CE(p) = q sum(p) - p;  d L1 = q (s - <q, s>) with s = sign(q - p)
            sign = difference.sign_()
            inner = (draft_probs * sign).sum(-1, keepdim=True)
            scale = ce_weight * in_vocab + distillation_weight * inside
            grad = sign.sub_(inner).mul_(l1_weight).add_(scale[:, None]).mul_(draft_probs)
            grad.scatter_add_(1, label, (-ce_weight * in_vocab)[:, None])
            grad.sub_(target_probs, alpha=distillation_weight)
            grad.mul_(row_weights[i, None])
            grad = grad.to(head.dtype)
            grad_hidden[i] = grad @ head
            grad_markov[i] = grad @ w2
            grad_w2.add_(grad.T @ markov[i])
        ctx.save_for_backward(grad_hidden, grad_markov, grad_w2)
        ctx.mark_non_differentiable(l1)
        return (row_weights * row_loss).sum(), l1

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_unused: Tensor):  # pyright: ignore
        grad_hidden, grad_markov, grad_w2 = ctx.saved_tensors
        return (grad_loss * grad_hidden, grad_loss * grad_markov, grad_loss * grad_w2, *[None] * 8)


@dataclass
class SlotTargets:
    """What N supervised slots are trained towards (see `DistributionLoss.forward`)."""

    hidden: Tensor
    logsumexp: Tensor
    labels: Tensor
    slots: Tensor  # [N] slot index k
    slot_weights: Tensor  # [N] exp(-k / decay), not normalised


def dspark_loss(
    hidden: Tensor,
    markov: Tensor,
    w2: Tensor,
    head: Tensor,
    confidence_logits: Tensor | None,
    targets: SlotTargets,
    weights: LossWeights,
    weight_sum: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """L = 0.1 CE + 0.9 L1 + 1.0 BCE(c, 1 - L1/2), each divided by the sum of slot weights.

    hidden [N, C], markov features [N, r] (r = 0: no sequential head), confidence_logits [N] or None without that head
    -> (loss, acceptance [N] = 1 - L1/2, detached). weight_sum: to divide by, where the N slots are a part of a step.
    """
    normalised = targets.slot_weights / (targets.slot_weights.sum() if weight_sum is None else weight_sum)
    loss, l1 = DistributionLoss.apply(
        hidden,
        markov,
        w2,
        head,
        targets.hidden,
        targets.logsumexp,
        targets.labels,
        normalised,
        weights.cross_entropy,
        weights.total_variation,
        weights.distillation,
    )  # pyright: ignore
    acceptance = (1 - l1 / 2).clamp(0, 1)
    if confidence_logits is None:
        return loss, acceptance
    bce = F.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
    return loss + weights.confidence * (normalised * bce).sum(), acceptance
