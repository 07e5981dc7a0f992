"""Where two greedy outputs part, and whether the target was undecided there."""

from dataclasses import dataclass

import torch

from dspark.models.attention import packed_attention
from dspark.models.decoder import Decoder


@dataclass(frozen=True)
class Difference:
    """First position (in the answer) at which outputs differ, the two tokens and the target's logits for them."""

    position: int
    tokens: tuple[int, int]
    logits: tuple[float, float]


@torch.inference_mode()
def first_difference(target: Decoder, prompt: list[int], a: list[int], b: list[int]) -> Difference | None:
    """None if the answers a and b are equal; the logits come from one whole forward over the common prefix."""
    if a == b:
        return None
    position = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    assert position is not None, "one answer ends where the other, equal so far, goes on"
    tokens = torch.tensor(prompt + a[:position], device=target.device)
    attention = packed_attention([len(tokens)], target.config, target.kv_dtype, target.device)
    output = target.forward(tokens, torch.arange(len(tokens), device=target.device), attention)
    logits = target.logits(output.hidden[-1:])[0].float()
    return Difference(position, (a[position], b[position]), (logits[a[position]].item(), logits[b[position]].item()))
