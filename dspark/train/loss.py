"""The training loss (design §6), fused: products one chunk of rows at a time, softmaxes and gradients in tiles of it.

Nothing of size rows x vocabulary outlives its chunk, so memory does not grow with the batch.
Shapes: N supervised slots, n of them in a chunk or tile, C width, r head rank, V' draft vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20  # of each of the two buffers of logits: 2,048 rows of 8,192 in bf16, 110 of 151,936
TILE_BYTES = 512 << 10  # of each of the three fp32 buffers that a CPU works in: they stay in its second-level cache


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
        copied: Tensor,  # [N] draft-vocabulary index of the token that the copy head favours
        copy_bias: Tensor,  # [N] by how much; 0: not at all
        row_weights: Tensor,  # [N]
        weights: LossWeights,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden, grad_markov, grad_w2 = torch.empty_like(hidden), torch.empty_like(markov), torch.zeros_like(w2)
        grad_bias = torch.empty_like(copy_bias)
        row_loss, l1 = torch.empty_like(target_logsumexp), torch.empty_like(target_logsumexp)
        # Products run in the precision of the frozen head, everything else in fp32.
        hidden, markov, w2, target_hidden = (t.to(head.dtype) for t in (hidden, markov, w2, target_hidden))
        weighted_markov = (row_weights[:, None] * markov).to(head.dtype)
        chunk = max(1, CHUNK_BYTES // (len(head) * head.element_size()))
        tile = max(1, TILE_BYTES // (len(head) * 4)) if head.device.type == "cpu" else chunk
        all_logits = [head.new_empty(min(chunk, len(hidden)), len(head)) for _ in range(2)]
        per_row = target_logsumexp, labels, copied, copy_bias
        buffers = head.new_empty(3, min(tile, len(hidden)), len(head), dtype=torch.float32)
        for first in range(0, len(hidden), chunk):
            i = slice(first, min(first + chunk, len(hidden)))
            target_logits, logits = (t[: i.stop - first] for t in all_logits)
            torch.mm(target_hidden[i], head.T, out=target_logits)
            torch.mm(hidden[i], head.T, out=logits).addmm_(markov[i], w2.T)
            for start in range(first, i.stop, tile):
                rows = slice(start, min(start + tile, i.stop))
                j = slice(start - first, rows.stop - first)
                row_loss[rows], l1[rows] = loss_and_gradient(
                    target_logits[j], logits[j], buffers[:, : rows.stop - start], weights, *(t[rows] for t in per_row)
                )
            # The rows' weights come in where rows are narrow.
            grad_bias[i] = row_weights[i] * logits.gather(1, copied[i, None])[:, 0]
            grad_hidden[i] = row_weights[i, None] * (logits @ head)
            grad_markov[i] = row_weights[i, None] * (logits @ w2)
            grad_w2 += logits.T @ weighted_markov[i]
        ctx.save_for_backward(grad_hidden, grad_markov, grad_w2, grad_bias)
        ctx.mark_non_differentiable(l1)
        return (row_weights * row_loss).sum(), l1

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_unused: Tensor):  # pyright: ignore
        of_hidden, of_markov, of_w2, of_bias = (grad_loss * gradient for gradient in ctx.saved_tensors)
        return (of_hidden, of_markov, of_w2, *[None] * 5, of_bias, None, None)


def loss_and_gradient(
    target_logits: Tensor,
    logits: Tensor,
    buffers: Tensor,
    weights: LossWeights,
    target_logsumexp: Tensor,
    labels: Tensor,
    copied: Tensor,
    copy_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and L1 [n] of rows of logits [n, V'], which are replaced by the loss's gradient with respect to them.

    The others are rows of the arguments of `DistributionLoss.forward`. buffers [3, n, V'] fp32 are written over.
    """
    target_probs, draft, scratch = buffers.unbind()
    target_probs.copy_(target_logits).sub_(target_logsumexp[:, None]).exp_()
    draft.copy_(logits).scatter_add_(1, copied[:, None], copy_bias[:, None].float())
    inside = target_probs.sum(-1)
    expected_logit = torch.mul(target_probs, draft, out=scratch).sum(-1)
    label, in_vocab = labels.clamp(min=0)[:, None], (labels >= 0).float()
    label_logit = draft.gather(1, label).squeeze(1)
    maximum = draft.amax(-1)
    draft_probs = draft.sub_(maximum[:, None]).exp_()
    normaliser = draft_probs.sum(-1)
    draft_probs.mul_(normaliser.reciprocal()[:, None])
    logsumexp = maximum + normaliser.log()
    l1 = (2 - 2 * torch.minimum(draft_probs, target_probs, out=scratch).sum(-1)).clamp_(min=0)
    loss = weights.cross_entropy * (logsumexp - label_logit) * in_vocab + weights.total_variation * l1
    loss += weights.distillation * (logsumexp * inside - expected_logit)
    # d CE(x*) = q - onehot;  d CE(p) = q sum(p) - p;  d L1 = 2 (q sum(q below p) - (q below p))
    below = torch.lt(draft_probs, target_probs, out=scratch).mul_(draft_probs)
    of_label, of_below = weights.cross_entropy * in_vocab, 2 * weights.total_variation
    scale = of_label + weights.distillation * inside + of_below * below.sum(-1)
    grad = draft_probs.mul_(scale[:, None]).sub_(below, alpha=of_below)
    grad.sub_(target_probs, alpha=weights.distillation)
    logits.copy_(grad.scatter_add_(1, label, -of_label[:, None]))
    return loss, l1


@dataclass
class SlotTargets:
    """What N supervised slots are trained towards (see `DistributionLoss.forward`)."""

    hidden: Tensor
    logsumexp: Tensor
    labels: Tensor
    slot_weights: Tensor  # [N] exp(-k / decay), not normalised


def dspark_loss(
    hidden: Tensor,
    markov: Tensor,
    w2: Tensor,
    head: Tensor,
    confidence_logits: Tensor | None,
    targets: SlotTargets,
    weights: LossWeights,
    weight_sum: Tensor | None = None,
    copies: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """L = 0.1 CE + 0.9 L1 + 1.0 BCE(c, 1 - L1/2), each divided by the sum of slot weights.

    hidden [N, C], markov features [N, r] (r = 0: no sequential head), confidence_logits [N] or None without that head
    -> (loss, acceptance [N] = 1 - L1/2, detached). weight_sum: to divide by, where the N slots are a part of a step.
    copies: what the copy head favours, draft-vocabulary indices [N], and by how much [N].
    """
    if copies is None:
        copies = torch.zeros_like(targets.labels), torch.zeros_like(targets.logsumexp)
    normalised = targets.slot_weights / (targets.slot_weights.sum() if weight_sum is None else weight_sum)
    of_target = targets.hidden, targets.logsumexp, targets.labels
    loss, l1 = DistributionLoss.apply(hidden, markov, w2, head, *of_target, *copies, normalised, weights)  # pyright: ignore
    acceptance = (1 - l1 / 2).clamp(0, 1)
    if confidence_logits is None:
        return loss, acceptance
    bce = F.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
    return loss + weights.confidence * (normalised * bce).sum(), acceptance
