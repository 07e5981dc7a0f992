"""What the frozen target says about an example: tap features, last hidden state, log-normaliser.

Computed online when a batch needs them, several examples in one forward; a bounded memory cache keeps what fits for the
next epoch, or `feature_cache.py` keeps all of it on disk.
Logits are never stored: the loss rebuilds them from the last hidden state.
Shapes: S examples, T positions of one, A of them from its first answer on, N positions of all, C width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark.drafters.layers import LENGTHS
from dspark.models.attention import packed_attention
from dspark.models.decoder import Decoder
from dspark.train.data import Example

PACK_TOKENS = 512  # positions of one target forward; with more, a CPU is slower: they leave its second-level cache
LOGIT_ROWS = 64  # full-vocabulary rows alive at once while the log-normaliser is computed
LOGIT_TILE = 8  # of them, in a CPU's second-level cache


class Features(NamedTuple):
    """What training reads of an example, in bf16; a position that no block can use is left out.

    taps [T-2, taps*C]: the last anchor is T-2, and blocks see what is before theirs. hidden [A-1, C] (after the final
    norm) and logsumexp [A-1] fp32 over the vocabulary: from the first answer on, of the positions that a token follows.
    """

    taps: Tensor
    hidden: Tensor
    logsumexp: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self)


@dataclass
class Batch:
    """S examples padded to one length: tokens [S, T], taps [S, T, taps*C]; hidden [S, A-1, C] and logsumexp [S, A-1]
    begin at positions starts [S]. No block sees or is trained towards what is padding.
    """

    tokens: Tensor
    taps: Tensor
    hidden: Tensor
    logsumexp: Tensor
    starts: Tensor


def collate(examples: Sequence[Example], features: Sequence[Features]) -> Batch:
    taps, hidden, logsumexp = (pad_sequence(rows, batch_first=True) for rows in zip(*features))  # pyright: ignore
    tokens = pad_sequence([torch.tensor(e.token_ids) for e in examples], batch_first=True).to(taps.device)
    starts = torch.tensor([e.answer_spans[0][0] for e in examples], device=taps.device)
    length = padded_length(examples)
    tokens, taps = F.pad(tokens, (0, length - tokens.shape[1])), F.pad(taps, (0, 0, 0, length - taps.shape[1]))
    return Batch(tokens, taps, hidden, logsumexp, starts)


def padded_length(examples: Sequence[Example]) -> int:
    """Positions of a batch."""
    longest = max(len(e) for e in examples)
    return longest + -longest % LENGTHS


class FeatureSource:
    """Features computed by the target and kept while they fit `cache_bytes`."""

    def __init__(self, target: Decoder, tap_layers: tuple[int, ...], cache_bytes: int):
        self.target, self.tap_layers, self.cache_bytes = target, tap_layers, cache_bytes
        self.used_bytes = 0
        self._kept: dict[Example, Features] = {}

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """Features of examples, in their order. They are shared: copy them before writing or autograd."""
        missing = [e for e in dict.fromkeys(examples) if e not in self._kept]
        found = dict(zip(missing, self.compute_all(missing), strict=True))
        for example, features in found.items():
            if self.used_bytes + features.num_bytes <= self.cache_bytes:
                self._kept[example] = features
                self.used_bytes += features.num_bytes
        return [found.get(e) or self._kept[e] for e in examples]

    def compute_all(self, examples: Sequence[Example]) -> Iterator[Features]:
        """In their order, PACK_TOKENS positions at a time."""
        pack: list[Example] = []
        for example in examples:
            if sum(len(e) for e in (*pack, example)) > PACK_TOKENS and pack:
                yield from self.compute(pack)
                pack = []
            pack.append(example)
        if pack:
            yield from self.compute(pack)

    @torch.inference_mode()
    def compute(self, examples: Sequence[Example]) -> list[Features]:
        """One forward for all of them, each seeing itself alone."""
        device = self.target.device
        lengths = [len(e) for e in examples]
        tokens = torch.tensor([token for e in examples for token in e.token_ids], device=device)  # [N]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        attention = packed_attention(lengths, self.target.config, self.target.kv_dtype, device)
        output = self.target.forward(tokens, positions, attention, self.tap_layers)
        features = []
        by_example = (t.split(lengths) for t in (output.hidden, *output.taps))
        for example, hidden, *taps in zip(examples, *by_example, strict=True):
            answer = hidden[example.answer_spans[0][0] : -1]
            inputs = torch.cat([t[:-2] for t in taps], -1).to(torch.bfloat16)
            features.append(Features(inputs, answer.to(torch.bfloat16, copy=True), self.logsumexp(answer)))
        return features

    def logsumexp(self, hidden: Tensor) -> Tensor:
        """hidden [A-1, C] -> [A-1] in fp32."""
        sums = [hidden.new_empty(0, dtype=torch.float32)]
        for rows in hidden.split(LOGIT_ROWS):
            for logits in self.target.lm_head(rows).float().split(LOGIT_TILE):
                highest = logits.amax(-1, keepdim=True)
                sums.append(logits.sub_(highest).exp_().sum(-1).log_() + highest[:, 0])
        return torch.cat(sums)
