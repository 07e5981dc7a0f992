"""Decoder layers one after the other: op by op, or as one compiled program where the CPU can have it.

Shapes: N rows, C width, H query heads, K KV heads, D head width, I inner width.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dspark.models import cpu_ops
from dspark.models.attention import CachedAttention
from dspark.models.cpu_chunks import AttentionShape
from dspark.models.cpu_ops import CompiledLinear
from dspark.models.cpu_program import Program, Programs
from dspark.models.layers import rms_norm

if TYPE_CHECKING:
    from dspark.models.decoder import Attention, DecoderLayer


class LayerStack:
    """Callable: x [N, C], positions [N] -> the norm of the last layer's output, and the outputs of layers asked for."""

    def __init__(self, layers: "list[DecoderLayer]", norm: Tensor):
        """norm [C]: weight of the norm after the last layer."""
        self.layers, self.norm = layers, norm
        self._program = LayerProgram(layers, norm) if all(map(is_compiled, layers)) else None

    def __call__(
        self, x: Tensor, positions: Tensor, attention: "Attention", tap_layers: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self._program is not None and isinstance(attention, CachedAttention) and attention.chunks is not None:
            return self._program(x, positions, attention, tap_layers)
        taps = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, i, attention)
            if i in tap_layers:
                taps[i] = x
        return rms_norm(x, self.norm, self.layers[0].config.rms_norm_eps), taps


def is_compiled(layer: "DecoderLayer") -> bool:
    """Whether kernels do all that the layer does."""
    maps = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    return layer.qkv_bias is None and layer.qk_norms is None and all(map(cpu_ops.is_dense, maps))


class LayerProgram:
    """The programs of a stack, one for each number of rows, layers to tap and shape of attention seen so far."""

    def __init__(self, layers: "list[DecoderLayer]", norm: Tensor):
        self.layers, self.norm = layers, norm
        c = layers[0].config
        widths = {
            "x": c.hidden_size,
            "normed": c.hidden_size,
            "qkv": c.q_size + 2 * c.kv_size,
            "attended": c.q_size,
            "delta": c.hidden_size,
            "gate_up": 2 * c.intermediate_size,
            "active": c.intermediate_size,
        }
        self._programs = Programs(self._build, widths, max(c.hidden_size, c.intermediate_size, c.q_size))

    def __call__(
        self, x: Tensor, positions: Tensor, attention: CachedAttention, tap_layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        chunks = attention.chunks
        assert chunks is not None
        tapped = tuple(sorted(set(tap_layers)))
        program = self._programs.get(len(x), tapped, chunks.shape)
        span, room = chunks.shape.scratch(chunks.longest)
        output = torch.empty(x.shape)
        taps = dict(zip(tapped, torch.empty(len(tapped), *x.shape), strict=True))
        program.run(
            input=x.contiguous(),
            output=output,
            positions=positions,
            slots=attention.slots,
            cache=np.repeat([storage.data_ptr() for storage in attention.storage], 2),  # written, then read
            chunks=chunks.chunks,
            scores=torch.empty(torch.get_num_threads() * room),
            room=room,
            span=span,
            items=chunks.items,
            **{f"tap{i}": tap for i, tap in taps.items()},
        )
        return output, taps

    def _build(self, rows: int, tapped: tuple[int, ...], shape: AttentionShape) -> Program:
        c, program, at = self.layers[0].config, Program(), self._programs.buffers
        stride = c.q_size + 2 * c.kv_size
        norm = cpu_ops.kernel("rms_norm", c.hidden_size, c.rms_norm_eps)
        add_and_norm = cpu_ops.kernel("add_rms_norm", c.hidden_size, c.rms_norm_eps)
        rotary = cpu_ops.kernel("rotary", c.num_heads + c.num_kv_heads, c.head_dim)
        store = cpu_ops.kernel("store", 2 * c.kv_size, shape.in_bf16)
        silu_mul = cpu_ops.kernel("silu_mul", c.intermediate_size)

        def linear(linear_map: CompiledLinear, source: str, target: str) -> None:
            program.add_linear(linear_map, at[source], at[target], self._programs.scratch, rows)

        x = "input"  # of a layer: the caller's, a tap of the layer before, or a buffer
        program.add(norm, x, self.layers[0].input_norm, at["normed"], rows)
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for i, layer in enumerate(self.layers):
            linear(layer.qkv_proj, "normed", "qkv")  # pyright: ignore
            program.add(rotary, at["qkv"], layer.rotary, "positions", stride, rows)
            program.add(store, at["qkv"][:, c.q_size :], "cache", "slots", stride, rows)
            attended = at["qkv"], "cache", at["attended"], "scores", "chunks", stride, "room", "span", "items"
            program.add(shape.kernel, *attended)
            linear(layer.o_proj, "attended", "delta")  # pyright: ignore
            program.add(add_and_norm, x, at["delta"], layer.post_attention_norm, at["x"], at["normed"], rows)
            linear(layer.gate_up_proj, "normed", "gate_up")  # pyright: ignore
            program.add(silu_mul, at["gate_up"], at["active"], rows)
            linear(layer.down_proj, "active", "delta")  # pyright: ignore
            x = f"tap{i}" if i in tapped else at["x"]
            normed = at["normed"] if i + 1 < len(self.layers) else "output"
            program.add(add_and_norm, at["x"], at["delta"], next_norms[i], x, normed, rows)
        return program
