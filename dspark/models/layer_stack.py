"""Decoder layers one after the other: op by op, or as one compiled program where the CPU can have it.

A layer is ten operations of a few microseconds each; called one by one from Python, a third of a token's time would
go into calling them. The program is a table of kernels and their arguments that all threads walk together.

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
from dspark.models.cpu_ops import CompiledLinear, Program

if TYPE_CHECKING:
    from dspark.models.decoder import Attention, DecoderLayer


class LayerStack:
    """Callable: x [N, C], cos, sin [N, 1, D] -> the last layer's output and those of the layers asked for."""

    def __init__(self, layers: "list[DecoderLayer]"):
        self.layers = layers
        self._program = LayerProgram(layers) if all(map(is_compiled, layers)) else None

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: "Attention", tap_layers: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self._program is not None and isinstance(attention, CachedAttention) and attention.chunks is not None:
            return self._program(x, cos, sin, attention, tap_layers)
        taps = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, i, attention)
            if i in tap_layers:
                taps[i] = x
        return x, taps


def is_compiled(layer: "DecoderLayer") -> bool:
    """Whether kernels do all that the layer does."""
    maps = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    return (
        layer.qkv_bias is None
        and layer.qk_norms is None
        and all(isinstance(m, CompiledLinear) and m.dense for m in maps)
    )


class LayerProgram:
    """The program of a stack for each number of rows seen so far, and the buffers that they share.

    Buffers hold one layer's intermediate results, so a call's result is copied out before it returns.
    """

    def __init__(self, layers: "list[DecoderLayer]"):
        self.layers = layers
        self._capacity = self._taps = 0
        self._buffers: dict[str, Tensor] = {}
        self._programs: dict[tuple[int, tuple[int, ...], AttentionShape], Program] = {}

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: CachedAttention, tap_layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        rows, last, chunks = len(x), len(self.layers) - 1, attention.chunks
        assert chunks is not None
        tapped = tuple(sorted({i for i in tap_layers if i < last}))
        self._grow(rows, len(tapped))
        key = rows, tapped, chunks.shape
        if key not in self._programs:
            self._programs[key] = self._build(*key)
        program = self._programs[key]
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        span, room = chunks.shape.scratch(chunks.longest)
        scratch = torch.empty(torch.get_num_threads() * room)
        program.set("input", x.data_ptr())
        program.set("cos", cos.data_ptr())
        program.set("sin", sin.data_ptr())
        program.set("slots", attention.slots.data_ptr())
        caches = [storage.data_ptr() for storage in attention.storage]
        program.set("cache", np.repeat(caches, 2))  # a layer writes it, then reads it
        program.set("chunks", chunks.chunks.data_ptr())
        program.set("scratch", scratch.data_ptr())
        program.set("room", room)
        program.set("span", span)
        program.set("items", chunks.items)
        program.run()
        buffers = self._buffers
        taps = {i: buffers[f"tap{k}"][:rows].clone() for k, i in enumerate(tapped)}
        output = buffers["x"][:rows] + buffers["delta"][:rows]
        if last in tap_layers:
            taps[last] = output
        return output, taps

    def _grow(self, rows: int, taps: int) -> None:
        """Buffers for so many rows; programs point into them and go when they move."""
        if rows <= self._capacity and taps <= self._taps:
            return
        c = self.layers[0].config
        self._taps = max(taps, self._taps)
        self._capacity = -(-max(rows, self._capacity, 16) // 16) * 16  # whole tiles are written
        widths = {
            "x": c.hidden_size,
            "normed": c.hidden_size,
            "qkv": c.q_size + 2 * c.kv_size,
            "attended": c.q_size,
            "delta": c.hidden_size,
            "gate_up": 2 * c.intermediate_size,
            "active": c.intermediate_size,
            "rounded": torch.get_num_threads() * max(c.hidden_size, c.intermediate_size, c.q_size),
        }
        widths |= {f"tap{i}": c.hidden_size for i in range(self._taps)}
        self._buffers = {name: torch.empty(self._capacity, width) for name, width in widths.items()}
        self._programs.clear()

    def _build(self, rows: int, tapped: tuple[int, ...], shape: AttentionShape) -> Program:
        c = self.layers[0].config
        at = {name: buffer.data_ptr() for name, buffer in self._buffers.items()}
        qkv_stride = c.q_size + 2 * c.kv_size
        program, x = Program(), 0  # the first layer's input is the caller's

        def linear(linear_map: CompiledLinear, source: str, target: str) -> None:
            program.add(linear_map.kernel, *linear_map.fields(at[source], at[target], at["rounded"], rows))

        def add_and_norm(weight: Tensor, target: str) -> None:
            """x + delta to `target`, its norm to `normed`."""
            nonlocal x
            kernel = cpu_ops.kernel("add_rms_norm", c.hidden_size, c.rms_norm_eps)
            fields = {"delta": at["delta"], "weight": weight.data_ptr(), "sum": at[target], "y": at["normed"]}
            name = "input" if x == 0 else "x"
            program.add(kernel, **{name: x}, **fields, rows=rows)
            x = at[target]

        for i, layer in enumerate(self.layers):
            if i == 0:
                kernel = cpu_ops.kernel("rms_norm", c.hidden_size, c.rms_norm_eps)
                program.add(kernel, input=0, weight=layer.input_norm.data_ptr(), y=at["normed"], rows=rows)
            else:
                add_and_norm(layer.input_norm, f"tap{tapped.index(i - 1)}" if i - 1 in tapped else "x")
            linear(layer.qkv_proj, "normed", "qkv")  # pyright: ignore
            rotary = cpu_ops.kernel("rotary", c.num_heads + c.num_kv_heads, c.head_dim)
            program.add(rotary, x=at["qkv"], cos=0, sin=0, stride=qkv_stride, rows=rows)
            store = cpu_ops.kernel("store", 2 * c.kv_size, shape.in_bf16)
            keys = at["qkv"] + 4 * c.q_size
            program.add(store, x=keys, cache=0, slots=0, stride=qkv_stride, rows=rows)
            parts = {"cache": 0, "out": at["attended"], "scratch": 0, "chunks": 0}
            program.add(shape.kernel, q=at["qkv"], **parts, stride=qkv_stride, room=0, span=0, items=0)
            linear(layer.o_proj, "attended", "delta")  # pyright: ignore
            add_and_norm(layer.post_attention_norm, "x")
            linear(layer.gate_up_proj, "normed", "gate_up")  # pyright: ignore
            silu_mul = cpu_ops.kernel("silu_mul", c.intermediate_size)
            program.add(silu_mul, x=at["gate_up"], y=at["active"], rows=rows)
            linear(layer.down_proj, "active", "delta")  # pyright: ignore
        return program
