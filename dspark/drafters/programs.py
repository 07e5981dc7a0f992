"""Parts of the DSpark drafter as compiled programs: one call each where there would be dozens.

Shapes: N committed tokens, C width, L draft layers, K KV heads, D head width; R requests, G slots, V' draft
vocabulary, r head rank.
"""

import numpy as np
import torch
from torch import Tensor

from dspark.drafters import bound
from dspark.drafters.copying import CopyBias
from dspark.models import cpu_ops
from dspark.models.config import DecoderConfig
from dspark.models.cpu_ops import CompiledLinear
from dspark.models.cpu_program import Program, Programs
from dspark.sampling import least_exponent
from dspark.spec.draft import Draft


class ContextProgram:
    """Callable: taps of committed tokens to what is kept of them: layers' keys and values, fused taps if asked."""

    def __init__(
        self, fc: CompiledLinear, norm: Tensor, context_kv: CompiledLinear, rotary: Tensor, config: DecoderConfig
    ):
        """fc [N, taps*C] -> [N, C], norm [C], context_kv [N, C] -> [N, L*2*K*D]; rotary: see `rotary_table`."""
        self.fc, self.norm, self.context_kv, self.rotary, self.config = fc, norm, context_kv, rotary, config
        widths = {"taps": fc.inputs, "mixed": fc.outputs, "normed": fc.outputs, "product": context_kv.outputs}
        self._programs = Programs(self._build, widths, max(fc.inputs, context_kv.inputs))

    def __call__(
        self, taps: list[Tensor], positions: Tensor, slots: Tensor, caches: list[Tensor], fused: Tensor | None
    ) -> None:
        """taps [N, C] each; positions, slots [N]; caches [slots, 2, K, D] a layer; fused [slots, C]."""
        program = self._programs.get(len(slots), caches[0].dtype is torch.bfloat16, fused is not None)
        torch.cat(taps, -1, out=self._programs.buffers["taps"][: len(slots)])
        cache = [layer.data_ptr() for layer in caches]
        kept = {} if fused is None else {"fused": fused}
        program.run(positions=positions, slots=slots, cache=cache, **kept)

    def _build(self, rows: int, in_bf16: bool, keep_fused: bool) -> Program:
        c, at, scratch = self.config, self._programs.buffers, self._programs.scratch
        rotary = cpu_ops.kernel("rotary", c.num_kv_heads, c.head_dim)
        store = cpu_ops.kernel("store", 2 * c.kv_size, in_bf16)
        norm = cpu_ops.kernel("rms_norm", c.hidden_size, c.rms_norm_eps)
        program = Program()
        program.add_linear(self.fc, at["taps"], at["mixed"], scratch, rows)
        if keep_fused:
            keep = cpu_ops.kernel("store", c.hidden_size, in_bf16)
            program.add(keep, at["mixed"], "fused", "slots", c.hidden_size, rows)
        program.add(norm, at["mixed"], self.norm, at["normed"], rows)
        program.add_linear(self.context_kv, at["normed"], at["product"], scratch, rows)
        for own in at["product"].split(2 * c.kv_size, -1):
            program.add(rotary, own, self.rotary, "positions", self.context_kv.outputs, rows)
            program.add(store, own, "cache", "slots", self.context_kv.outputs, rows)
        return program


class BlockInputs:
    """Callable: what the first draft layer gets where blocks start from features (`DSparkConfig.feature_input`)."""

    def __init__(
        self,
        embedding: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        proj: CompiledLinear,
        eps: float,
    ):
        """embedding [V, C]; weights [C] of the feature's norm and the token's, and the mask's embedding after its norm;
        proj [N, 2C] -> [N, C]."""
        self.embedding, self.weights, self.proj, self.eps = embedding, weights, proj, eps
        # A block has two rows: its first slot's, and that of all others.
        widths = {"pairs": 2 * proj.inputs, "y": 2 * proj.outputs}
        self._programs = Programs(self._build, widths, 2 * proj.inputs)

    def __call__(self, features: Tensor, before: Tensor, tokens: Tensor, slots: int) -> Tensor:
        """features [slots, C]; of each anchor the slot before its own (-1: none) and its token [R] -> [R*slots, C]."""
        program = self._programs.get(len(tokens), slots, features.dtype is torch.bfloat16)
        x = torch.empty(len(tokens) * slots, self.proj.outputs)
        program.run(features=features, slots=before, tokens=tokens, x=x)
        return x

    def _build(self, r: int, slots: int, in_bf16: bool) -> Program:
        width, program, at = self.proj.outputs, Program(), self._programs.buffers
        rows = torch.arange(r)[:, None].repeat(1, slots)
        rows[:, 1:] += r
        read = "features", "slots", "tokens", self.embedding, *self.weights
        program.add(cpu_ops.kernel("draft_input", width, self.eps, in_bf16), *read, at["pairs"], r)
        program.add_linear(self.proj, at["pairs"], at["y"], self._programs.scratch, 2 * r)
        program.add(cpu_ops.kernel("embed", width), rows, at["y"], "x", 1, r * slots)
        return program


class MarkovProgram:
    """The vanilla Markov head and the copy head of whole blocks, each slot from the token drafted before it."""

    def __init__(
        self,
        block_size: int,
        w1: Tensor,
        w2: CompiledLinear,
        d2t: Tensor,
        confidence: Tensor,
        copies: CopyBias | None = None,
    ):
        """w1 [V, r] fp32, w2 [R, r] -> [R, V'], d2t [V'] the drafted ids; confidence: see `slot_signals`."""
        self.w1, self.w2, self.d2t, self.copies = w1.contiguous(), w2, d2t.contiguous(), copies
        self.confidence = confidence.contiguous()
        widths = {"bias": len(d2t), "settings": 4, "features": block_size * w1.shape[1], "evidence": 3 * block_size}
        self._programs = Programs(self._build, widths, w1.shape[1])

    def __call__(
        self,
        previous: Tensor,
        logits: Tensor,
        hidden: Tensor,
        temperatures: Tensor,
        copied: tuple[Tensor, Tensor] | None = None,
        sampling: tuple[Tensor, Tensor] | None = None,
    ) -> Draft:
        """Slot k is the likeliest token under its logits, the bias of the slot before it and that of the copy head, or
        drawn from the NUM_CANDIDATES likeliest.

        Previous tokens [R], logits [R, G, V'] without bias, which are read only, and the hidden states [R, G, C] that
        they are of; temperatures [R]; copied: with a copy head history [slots] and spans [2, R], see `CopyBias`;
        sampling: `sampling_rows` and draws [R, G] in fp64.
        """
        r, g, vocab = logits.shape
        candidates = 0 if sampling is None else min(bound.NUM_CANDIDATES, vocab)
        program, tokens = self._programs.get(r, g, candidates)
        tokens[:, 0] = previous
        logits = logits.contiguous()
        readers = 1 if sampling is None else 2  # kernels of a slot
        signals, lengths = torch.empty(r, g, 6), torch.full((r,), g)
        values: dict = {"logits": np.repeat(of_slots(logits), readers), "signals": signals}
        values |= {"hidden": hidden.contiguous(), "temperatures": temperatures}
        if copied is not None:
            values["history"], values["spans"] = copied
        if sampling is None:
            program.run(**values)
            return Draft.unsampled(tokens[:, 1:].clone(), lengths, signals)
        settings, draws = (t.contiguous() for t in sampling)
        self._programs.buffers["settings"][:r] = settings
        support, probs = torch.empty(r, g, candidates, dtype=torch.int64), torch.empty(r, g, candidates)
        program.run(**values, draws=of_slots(draws), support=of_slots(support), probs=of_slots(probs))
        return Draft(tokens[:, 1:].clone(), support, probs, lengths, signals)

    def _build(self, r: int, g: int, candidates: int) -> tuple[Program, Tensor]:
        """The program for R blocks, and the tokens [R, 1 + G] that it begins with and writes."""
        program, tokens = Program(), torch.zeros(r, g + 1, dtype=torch.int64)
        rank, vocab, at = self.w1.shape[1], len(self.d2t), self._programs.buffers
        features = at["features"].flatten()[: g * r * rank].view(g, r, rank)
        largest, below, lengths = at["evidence"].flatten()[: 3 * g * r].view(3, g, r)
        if self.copies is None:
            lengths = torch.zeros(g, r)  # which nothing writes
        bias, stride = at["bias"], (g * vocab, g + 1)  # of logits, of tokens
        embed, likeliest = cpu_ops.kernel("embed", rank), cpu_ops.kernel("likeliest", vocab)
        for k in range(g):
            previous = tokens[:, k]
            program.add(embed, previous, self.w1, features[k], g + 1, r)
            program.add_linear(self.w2, features[k], bias, self._programs.scratch, r)
            if self.copies is not None:
                read = "history", "spans", previous, self.copies.ids, self.copies.weights[k]
                program.add(self.copies.kernel, *read, bias, lengths[k], k, g + 1, vocab, r)
            program.add(likeliest, "logits", bias, self.d2t, tokens[:, k + 1], largest[k], below[k], *stride, r)
            if candidates:  # another token in place of the likeliest, of which the probability and entropy stay
                draw = cpu_ops.kernel("draw", vocab, candidates, -bound.LEAST, least_exponent(torch.float32))
                own = tokens[:, k + 1], "support", "probs"
                program.add(draw, "logits", bias, self.d2t, at["settings"], "draws", *own, g, r)
        signals = cpu_ops.kernel("signals", len(self.confidence) - rank - 1, rank, bound.ODDS_EPS)
        seen = features, largest, below, lengths
        program.add(signals, "hidden", self.confidence, *seen, "temperatures", "signals", g, r * g)
        return program, tokens


def of_slots(values: Tensor) -> list[int]:
    """Addresses of the slots of the first request, values [R, G, ...] contiguous."""
    return [values.data_ptr() + values.itemsize * values.stride(1) * k for k in range(values.shape[1])]
