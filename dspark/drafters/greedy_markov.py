"""The vanilla Markov head drafting greedily, all slots as one compiled program: else each slot is a dozen calls."""

import torch
from torch import Tensor

from dspark.models import cpu_ops
from dspark.models.cpu_ops import CompiledLinear, Program


class GreedyMarkov:
    """Callable: previous tokens [R], logits [R, G, V'] without bias -> tokens [R, G], W1 of the token before each
    [R, G, r], and each token's probability [R, G] at temperature 1.

    Slot k is the likeliest token under its logits and the bias of the slot before it.
    """

    def __init__(self, w1: Tensor, w2: CompiledLinear, d2t: Tensor):
        """w1 [V, r] fp32, w2 [R, r] -> [R, V'], d2t [V'] the drafted ids."""
        self.w1, self.w2, self.d2t = w1.contiguous(), w2, d2t.contiguous()
        self._programs: dict[tuple[int, int], tuple[Program, Tensor, Tensor, Tensor]] = {}
        self._bias = self._rounded = torch.empty(0)

    def __call__(self, previous: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, g, _ = logits.shape
        if (r, g) not in self._programs:
            self._programs[r, g] = self._build(r, g)
        program, tokens, features, largest = self._programs[r, g]
        tokens[:, 0] = previous
        logits = logits.contiguous()
        program.set("logits", logits.data_ptr() + 4 * len(self.d2t) * torch.arange(g).numpy())
        program.run()
        return tokens[:, 1:].clone(), features.transpose(0, 1), largest.T

    def _build(self, r: int, g: int) -> tuple[Program, Tensor, Tensor, Tensor]:
        """The program for R blocks, and what it writes: tokens [R, 1 + G], features [G, R, r], largest [G, R]."""
        vocab, rank = len(self.d2t), self.w1.shape[1]
        padded = r + -r % 16  # whole tiles are written
        if len(self._bias) < padded:
            self._bias = torch.empty(padded, vocab)
            self._rounded = torch.empty(torch.get_num_threads() * padded * rank)
            self._programs.clear()
        program, tokens, features = Program(), torch.zeros(r, g + 1, dtype=torch.int64), torch.empty(g, r, rank)
        largest = torch.empty(g, r)
        bias, rounded = self._bias.data_ptr(), self._rounded.data_ptr()
        embed, likeliest = cpu_ops.kernel("embed", rank), cpu_ops.kernel("likeliest", vocab)
        for k in range(g):
            before, after = (tokens[:, i].data_ptr() for i in (k, k + 1))
            own = features[k].data_ptr()
            program.add(embed, before, self.w1.data_ptr(), own, g + 1, r)
            program.add(self.w2.kernel, *self.w2.fields(own, bias, rounded, r))
            found = {"bias": bias, "ids": self.d2t.data_ptr(), "tokens": after, "largest": largest[k].data_ptr()}
            program.add(likeliest, logits=0, **found, stride=g * vocab, step=g + 1, rows=r)
        return program, tokens, features, largest
