"""What the frozen target says about an example: tap features, last hidden state, log-normaliser.

Computed online when a batch needs them; a bounded memory cache keeps what fits for the next epoch.
Logits are never stored: the loss rebuilds them from the last hidden state.
Shapes: T positions, C width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.models.decoder import Decoder
from dspark.train.data import Example

LOGIT_ROWS = 64  # full-vocabulary rows alive at once while the log-normaliser is computed


@dataclass
class Features:
    """taps [T, taps*C] and hidden [T, C] (after the final norm) in bf16; logsumexp [T] fp32 over the vocabulary
    (0 in the prompt)."""

    taps: Tensor
    hidden: Tensor
    logsumexp: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.taps, self.hidden, self.logsumexp))


class WholeSequenceAttention:
    """Causal attention of one sequence without a cache."""

    def __init__(self, group_size: int):
        self.group_size = group_size

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        k, v = (t.transpose(0, 1)[None].repeat_interleave(self.group_size, 1) for t in kv.unbind(1))
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True)
        return out[0].transpose(0, 1).reshape(q.shape[0], -1)


class FeatureSource:
    """Features of examples by index, computed by the target and kept while they fit `cache_bytes`."""

    def __init__(self, target: Decoder, tap_layers: tuple[int, ...], cache_bytes: int):
        self.target, self.tap_layers, self.cache_bytes = target, tap_layers, cache_bytes
        self.used_bytes = 0
        self._kept: dict[int, Features] = {}

    def get(self, index: int, example: Example) -> Features:
        """index: the example's stable number. The result is shared: do not write to it."""
        if index in self._kept:
            return self._kept[index]
        features = self.compute(example)
        if self.used_bytes + features.num_bytes <= self.cache_bytes:
            self._kept[index] = features
            self.used_bytes += features.num_bytes
        return features

    @torch.no_grad()
    def compute(self, example: Example) -> Features:
        device = self.target.device
        tokens = torch.tensor(example.token_ids, device=device)
        attention = WholeSequenceAttention(self.target.config.group_size)
        positions = torch.arange(len(tokens), device=device)
        output = self.target.forward(tokens, positions, attention, self.tap_layers)
        hidden = self.target.final_hidden(output.hidden)
        answer = len(example.first_prompt)  # nothing before the first answer is trained towards
        chunks = [self.target.lm_head(rows).float().logsumexp(-1) for rows in hidden[answer:].split(LOGIT_ROWS)]
        return Features(
            torch.cat(output.taps, -1).to(torch.bfloat16),
            hidden.to(torch.bfloat16),
            F.pad(torch.cat(chunks), (answer, 0)),
        )
