"""Attention of a drafter in training, with gradients in closed form.

Written out for autograd they pass over memory three times as often, which is most of what a training step costs
beside its products.
Shapes: S sequences, T positions, A anchors, B slots of a block that are seen, K KV heads, Z = S*K, n query rows of a
block that share a KV head, D head width.
"""

import torch
from torch import Tensor


class BlockAttention(torch.autograd.Function):
    """Softmax over the context before a block's anchor and the block's own slots.

    Exponentials are kept for the way back and normalised after the products with them, where rows are narrow.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,  # [Z, A*n, D], scaled
        k_context: Tensor,  # [Z, T, D]
        v_context: Tensor,
        k_block: Tensor,  # [Z*A, B, D]
        v_block: Tensor,
        context_mask: Tensor,  # [S, A, T], True where seen
    ) -> Tensor:
        """-> [Z, A*n, D]. All but the mask are of one dtype, in which scores are rounded."""
        (s, a, t), (z, rows, _) = context_mask.shape, q.shape
        bias = q.new_zeros(s, 1, a, 1, t).masked_fill_(~context_mask[:, None, :, None], float("-inf"))
        on_context = torch.bmm(q, k_context.mT)  # [Z, A*n, T]
        on_context.view(s, z // s, a, rows // a, t).add_(bias)
        on_block = torch.bmm(by_block(q, k_block), k_block.mT).view(z, rows, -1)
        highest = torch.maximum(on_context.amax(-1, keepdim=True), on_block.amax(-1, keepdim=True))
        on_context.sub_(highest).exp_()
        on_block.sub_(highest).exp_()
        total = on_context.sum(-1, keepdim=True) + on_block.sum(-1, keepdim=True)
        out = torch.bmm(by_block(on_block, v_block), v_block).view(q.shape)
        out = out.add_(torch.bmm(on_context, v_context)).div_(total)
        ctx.save_for_backward(q, k_context, v_context, k_block, v_block, on_context, on_block, total, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore
        q, k_context, v_context, k_block, v_block, on_context, on_block, total, out = ctx.saved_tensors
        grad = grad / total
        inner = (grad * out).sum(-1, keepdim=True)
        grad_of_block = by_block(grad, v_block)
        to_context = torch.bmm(grad, v_context.mT).sub_(inner).mul_(on_context)
        to_block = torch.bmm(grad_of_block, v_block.mT).view(on_block.shape).sub_(inner).mul_(on_block)
        q_of_block, to_block = by_block(q, k_block), by_block(to_block, k_block)
        return (
            torch.bmm(to_block, k_block).view(q.shape).add_(torch.bmm(to_context, k_context)),
            torch.bmm(to_context.mT, q),
            torch.bmm(on_context.mT, grad),
            torch.bmm(to_block.mT, q_of_block),
            torch.bmm(by_block(on_block, v_block).mT, grad_of_block),
            None,
        )


def by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """[Z, A*n, X] -> [Z*A, n, X], as many as blocks [Z*A, ...]."""
    return rows.reshape(len(blocks), -1, rows.shape[-1])
