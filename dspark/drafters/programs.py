"""Parts of the DSpark drafter as compiled programs: one call each where there would be dozens.

Shapes: N committed tokens, C width, L draft layers, K KV heads, D head width; R requests, G slots, V' draft
vocabulary, r head rank.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.copying import CopyBias
from dspark.models import cpu_ops
from dspark.models.config import DecoderConfig
from dspark.models.cpu_ops import CompiledLinear, Program


class ContextProgram:
    """Callable: taps of committed tokens to what is kept of them: layers' keys and values, fused taps if asked."""

    def __init__(self, fc: CompiledLinear, norm: Tensor, context_kv: CompiledLinear, config: DecoderConfig):
        """fc [N, taps*C] -> [N, C], norm [C], context_kv [N, C] -> [N, L*2*K*D]."""
        self.fc, self.norm, self.context_kv, self.config = fc, norm, context_kv, config
        self._programs: dict[tuple[int, bool, bool], Program] = {}
        self._capacity = 0
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(
        self, taps: list[Tensor], cos: Tensor, sin: Tensor, slots: Tensor, caches: list[Tensor], fused: Tensor | None
    ) -> None:
        """taps [N, C] each; cos, sin [N, 1, D]; slots [N]; caches [slots, 2, K, D] a layer; fused [slots, C]."""
        key = len(slots), caches[0].dtype is torch.bfloat16, fused is not None
        if len(slots) > self._capacity:
            self._grow(len(slots))
        if key not in self._programs:
            self._programs[key] = self._build(*key)
        program = self._programs[key]
        torch.cat(taps, -1, out=self._buffers[0][: len(slots)])
        program.set("cos", cos.data_ptr())
        program.set("sin", sin.data_ptr())
        program.set("slots", slots.data_ptr())
        program.set("cache", np.array([layer.data_ptr() for layer in caches]))
        if fused is not None:
            program.set("fused", fused.data_ptr())
        program.run()

    def _grow(self, rows: int) -> None:
        """Buffers for so many rows, shared by the programs, which point into them and go when they move."""
        self._capacity = rows + -rows % 16  # whole tiles are written
        widths = self.fc.inputs, self.fc.outputs, self.fc.outputs, self.context_kv.outputs
        rounded = torch.get_num_threads() * max(self.fc.inputs, self.context_kv.inputs)
        self._buffers = tuple(torch.empty(self._capacity, width) for width in (*widths, rounded))
        self._programs.clear()

    def _build(self, rows: int, in_bf16: bool, keep_fused: bool) -> Program:
        c, width = self.config, self.context_kv.outputs
        taps, mixed, normed, product, rounded = (buffer.data_ptr() for buffer in self._buffers)
        rotary = cpu_ops.kernel("rotary", c.num_kv_heads, c.head_dim)
        store = cpu_ops.kernel("store", 2 * c.kv_size, in_bf16)
        norm = cpu_ops.kernel("rms_norm", c.hidden_size, c.rms_norm_eps)
        program = Program()
        program.add(self.fc.kernel, *self.fc.fields(taps, mixed, rounded, rows))
        if keep_fused:
            keep = cpu_ops.kernel("store", c.hidden_size, in_bf16)
            program.add(keep, mixed, fused=0, slots=0, stride=c.hidden_size, rows=rows)
        program.add(norm, mixed, self.norm.data_ptr(), normed, rows)
        program.add(self.context_kv.kernel, *self.context_kv.fields(normed, product, rounded, rows))
        for start in range(0, width, 2 * c.kv_size):
            own = product + 4 * start
            program.add(rotary, x=own, cos=0, sin=0, stride=width, rows=rows)
            program.add(store, x=own, cache=0, slots=0, stride=width, rows=rows)
        return program


class BlockInputs:
    """Callable: what the first draft layer gets where blocks start from features (`DSparkConfig.feature_input`)."""

    def __init__(
        self,
        embedding: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        proj: CompiledLinear,
        eps: float,
        num_slots: int,
    ):
        """embedding [V, C]; weights [C] of the feature's norm and the token's, and the mask's embedding after its norm;
        proj [N, 2C] -> [N, C]."""
        self.embedding, self.weights, self.proj, self.eps = embedding, weights, proj, eps
        self.num_slots = num_slots  # of a block
        self._programs: dict[tuple[int, bool], Program] = {}
        self._buffers: tuple[Tensor, ...] = ()
        self._x = torch.empty(0, proj.outputs)

    def __call__(self, features: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
        """features [slots, C]; of each anchor the slot before its own (-1: none) and its token [R] -> [R*slots, C].

        The result is valid until the next call.
        """
        key = len(tokens), features.dtype is torch.bfloat16
        if len(tokens) * self.num_slots > len(self._x):
            self._grow(len(tokens))
        if key not in self._programs:
            self._programs[key] = self._build(*key)
        program = self._programs[key]
        program.set("features", features.data_ptr())
        program.set("slots", slots.data_ptr())
        program.set("tokens", tokens.data_ptr())
        program.run()
        return self._x[: len(tokens) * self.num_slots]

    def _grow(self, r: int) -> None:
        """Buffers for so many blocks, shared by the programs, which point into them and go when they move."""
        width, padded = self.proj.outputs, 2 * r + -2 * r % 16  # whole tiles are written
        sizes = padded * 2 * width, padded * width, torch.get_num_threads() * padded * width
        self._buffers = tuple(torch.zeros(size) for size in sizes)
        self._x = torch.empty(r * self.num_slots, width)
        self._programs.clear()

    def _build(self, r: int, in_bf16: bool) -> Program:
        width, program = self.proj.outputs, Program()
        pairs, y, rounded = (buffer.data_ptr() for buffer in self._buffers)
        weights = [t.data_ptr() for t in self.weights]
        named = {"features": 0, "slots": 0, "tokens": 0}
        more = {"embedding": self.embedding.data_ptr(), "feature": weights[0], "token": weights[1], "mask": weights[2]}
        program.add(cpu_ops.kernel("draft_input", width, self.eps, in_bf16), **named, **more, pairs=pairs, rows=r)
        program.add(self.proj.kernel, *self.proj.fields(pairs, y, rounded, 2 * r))
        program.add(cpu_ops.kernel("block_rows", width), y, self._x.data_ptr(), self.num_slots, r)
        return program


class GreedyBlock(NamedTuple):
    """What was drafted, W1 of the token before each slot, each token's probability at temperature 1, and how long a
    match the copy head saw."""

    tokens: Tensor  # [R, G]
    embeddings: Tensor  # [R, G, r]
    largest: Tensor  # [R, G]
    lengths: Tensor  # [R, G]


class GreedyMarkov:
    """Callable: previous tokens [R], logits [R, G, V'] without bias -> `GreedyBlock`.

    Slot k is the likeliest token under its logits, the bias of the slot before it and that of the copy head.
    """

    def __init__(self, w1: Tensor, w2: CompiledLinear, d2t: Tensor, copies: CopyBias | None = None):
        """w1 [V, r] fp32, w2 [R, r] -> [R, V'], d2t [V'] the drafted ids."""
        self.w1, self.w2, self.d2t, self.copies = w1.contiguous(), w2, d2t.contiguous(), copies
        self._programs: dict[tuple[int, int], tuple[Program, Tensor, GreedyBlock]] = {}
        self._bias = self._rounded = torch.empty(0)

    def __call__(
        self, previous: Tensor, logits: Tensor, history: Tensor | None = None, spans: Tensor | None = None
    ) -> GreedyBlock:
        """history [slots] and spans [2, R], see `CopyBias`: with a copy head only."""
        r, g, _ = logits.shape
        if (r, g) not in self._programs:
            self._programs[r, g] = self._build(r, g)
        program, tokens, block = self._programs[r, g]
        tokens[:, 0] = previous
        logits = logits.contiguous()
        program.set("logits", logits.data_ptr() + 4 * len(self.d2t) * torch.arange(g).numpy())
        if self.copies is not None and history is not None and spans is not None:
            program.set("history", history.data_ptr())
            program.set("spans", spans.data_ptr())
        program.run()
        return block._replace(tokens=tokens[:, 1:].clone())

    def _build(self, r: int, g: int) -> tuple[Program, Tensor, GreedyBlock]:
        """The program for R blocks, the tokens [R, 1 + G] that it begins with and writes, and all that it writes."""
        vocab, rank = len(self.d2t), self.w1.shape[1]
        padded = r + -r % 16  # whole tiles are written
        if len(self._bias) < padded:
            self._bias = torch.empty(padded, vocab)
            self._rounded = torch.empty(torch.get_num_threads() * padded * rank)
            self._programs.clear()
        program, tokens, features = Program(), torch.zeros(r, g + 1, dtype=torch.int64), torch.empty(g, r, rank)
        largest, lengths = torch.empty(g, r), torch.zeros(g, r)
        bias, rounded = self._bias.data_ptr(), self._rounded.data_ptr()
        embed, likeliest = cpu_ops.kernel("embed", rank), cpu_ops.kernel("likeliest", vocab)
        for k in range(g):
            before, after = (tokens[:, i].data_ptr() for i in (k, k + 1))
            own = features[k].data_ptr()
            program.add(embed, before, self.w1.data_ptr(), own, g + 1, r)
            program.add(self.w2.kernel, *self.w2.fields(own, bias, rounded, r))
            if self.copies is not None:
                of_copies = {"ids": self.copies.ids.data_ptr(), "weights": self.copies.weights[k].data_ptr()}
                places = {"history": 0, "spans": 0, "tokens": before}
                strides = {"slot": k, "step": g + 1, "stride": vocab, "rows": r}
                program.add(
                    self.copies.kernel, **places, **of_copies, bias=bias, lengths=lengths[k].data_ptr(), **strides
                )
            found = {"bias": bias, "ids": self.d2t.data_ptr(), "tokens": after, "largest": largest[k].data_ptr()}
            program.add(likeliest, logits=0, **found, stride=g * vocab, step=g + 1, rows=r)
        return program, tokens, GreedyBlock(tokens[:, 1:], features.transpose(0, 1), largest.T, lengths.T)
