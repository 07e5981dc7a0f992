"""LLVM code of the compiled CPU operations in `cpu_ops.py`.

Every kernel is `void kernel(Call*)`: a struct of pointers and sizes whose last field is the number of independent
items. Each OpenMP thread that enters it works on its share of them. An item's arithmetic never depends on other items.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

VECTORS = 2  # vectors of outputs a tile of the linear map is wide
PREFETCH = 4096  # bytes ahead; hardware prefetching stops at pages. 13.8 GB/s without it, 19 with it, for one row

Value = Any  # llvmlite's builder methods carry no types
I8, I16, I32, I64, F32, VOID = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())
FIELD_TYPES = {
    "f": F32.as_pointer(),
    "h": I16.as_pointer(),
    "w": I32.as_pointer(),
    "q": I64.as_pointer(),
    "i": I64,
}


class BFloat(ir.Type):
    """LLVM's bf16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@dataclass(frozen=True)
class Machine:
    """What code is generated for: fp32 lanes of a vector register, their number, and OpenMP's two addresses."""

    lanes: int
    registers: int
    bf16_dots: bool  # AVX512-BF16: sums of two bf16 products a lane in one instruction
    thread_num: int
    num_threads: int


class Emitter:
    """An IR builder inside `void kernel(Call*)`: the loaded `fields`, and `first`..`last`, this thread's items."""

    def __init__(self, fields: str, machine: Machine, lanes: int):
        """fields: one letter each (see FIELD_TYPES), the last one the number of items; lanes: width of `vector`."""
        self.lanes, self.vector = lanes, ir.VectorType(F32, lanes)
        self.module = ir.Module("kernel")
        self.module.triple = llvm.get_default_triple()
        call = ir.LiteralStructType([FIELD_TYPES[f] for f in fields])
        function = ir.Function(self.module, ir.FunctionType(VOID, [call.as_pointer()]), "kernel")
        self.b = b = ir.IRBuilder(function.append_basic_block())
        self.fields = [b.load(b.gep(function.args[0], [I32(0), I32(i)])) for i in range(len(fields))]

        def runtime(address: int) -> Value:
            pointer = b.inttoptr(I64(address), ir.FunctionType(I32, []).as_pointer())
            return b.zext(b.call(pointer, []), I64)

        thread, threads = runtime(machine.thread_num), runtime(machine.num_threads)
        self.thread = thread
        self.first, self.last = (b.udiv(b.mul(self.fields[-1], t), threads) for t in (thread, b.add(thread, I64(1))))

    def function(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """`with e.loop(a, b) as i`: a counting loop around what the body emits."""
        with self.sums(start, stop, [], step) as (i, _, _):
            yield i

    @contextmanager
    def sums(self, start: Value, stop: Value, initial: list[Value], step: int = 1) -> Iterator[tuple]:
        """A loop that carries values: yields (i, carried, results).

        The body replaces the contents of `carried`; after the loop `results` holds the final ones.
        """
        b, before = self.b, self.b.block
        head, body, end = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        results = [b.phi(v.type) for v in initial]
        for phi, value in zip(results, initial, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_unsigned("<", i, stop), body, end)
        b.position_at_end(body)
        carried = list(results)
        yield i, carried, results
        i.add_incoming(b.add(i, I64(step)), b.block)
        for phi, value in zip(results, carried, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(end)

    # -- vectors of fp32 ----------------------------------------------------------------------------

    def constant(self, value: float) -> Value:
        return ir.Constant(self.vector, [value] * self.lanes)

    def load(self, pointer: Value, index: Value) -> Value:
        return self.b.load(self.b.bitcast(self.b.gep(pointer, [index]), self.vector.as_pointer()), align=4)

    def store(self, value: Value, pointer: Value, index: Value) -> None:
        self.b.store(value, self.b.bitcast(self.b.gep(pointer, [index]), value.type.as_pointer()), align=4)

    def spread(self, scalar: Value) -> Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(self.b.insert_element(undefined, scalar, I32(0)), undefined, zeros)

    def fma(self, a: Value, x: Value, c: Value) -> Value:
        function = self.function(f"llvm.fma.v{self.lanes}f32", self.vector, [self.vector] * 3)
        return self.b.call(function, [a, x, c])

    def total(self, value: Value) -> Value:
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        function = self.function(name, F32, [F32, self.vector])
        return self.b.call(function, [F32(0.0), value], fastmath=("reassoc",))

    def maximum(self, a: Value, b: Value) -> Value:
        kind = f"v{self.lanes}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.b.call(self.function(f"llvm.maxnum.{kind}", a.type, [a.type] * 2), [a, b])

    def exp(self, x: Value) -> Value:
        """e**x to 2 units in the last place for x in -87..88 (clamped): 2**n times a polynomial of the rest."""
        b, words = self.b, ir.VectorType(I32, self.lanes)
        low = self.function(f"llvm.minnum.v{self.lanes}f32", self.vector, [self.vector] * 2)
        x = b.call(low, [self.maximum(x, self.constant(-87.0)), self.constant(88.0)])
        nearest = self.function(f"llvm.rint.v{self.lanes}f32", self.vector, [self.vector])
        n = b.call(nearest, [b.fmul(x, self.constant(math.log2(math.e)))])
        rest = self.fma(n, self.constant(-0.693359375), x)  # ln 2 in two parts, the first exact in few bits
        rest = self.fma(n, self.constant(2.12194440e-4), rest)
        result = self.constant(1 / math.factorial(7))
        for degree in range(6, -1, -1):
            result = self.fma(result, rest, self.constant(1 / math.factorial(degree)))
        exponent = b.shl(b.fptosi(n, words), ir.Constant(words, [23] * self.lanes))
        return b.bitcast(b.add(b.bitcast(result, words), exponent), self.vector)


def lanes_for(width: int, machine: Machine) -> int:
    """The widest vector that divides `width`."""
    return math.gcd(width, machine.lanes)


@dataclass(frozen=True)
class Products:
    """How a tile's sums grow: `step` inputs at a time, x and weights read as `x_type` and `weight_type`."""

    step: int
    x_type: ir.Type
    weight_type: ir.Type


KINDS = {"fp32": Products(1, F32, F32), "widened": Products(1, F32, I16), "dots": Products(2, I32, I32)}


def linear_kernel(machine: Machine, kind: str) -> ir.Module:
    """y = x W^T. Fields: x [N, K], w, y [N, tiles*tile], scratch, N, K; items: tiles. By `kind`:

    fp32      w [tiles, K, tile] fp32
    widened   w the same in bf16, widened in registers: products and sums in fp32
    dots      w [tiles, K/2, tile, 2] bf16, K a multiple of 16; x rounded to bf16 (into `scratch`, [threads, N, K]
              bf16), products of pairs summed in fp32: several times the speed where rows are many
    Every output is one chain of additions over K in its order, whatever N is.
    """
    products = KINDS[kind]
    e = Emitter(f"f{'w' if kind == 'dots' else 'h' if kind == 'widened' else 'f'}fwiii", machine, machine.lanes)
    b = e.b
    x, w, y, scratch, rows, inputs, tiles = e.fields
    if kind == "dots":
        x = b.gep(scratch, [b.udiv(b.mul(e.thread, b.mul(rows, inputs)), I64(2))])
        _round_to_bf16(e, e.fields[0], x, b.mul(rows, inputs))
        inputs = b.udiv(inputs, I64(2))
    # Accumulators of a tile, two weight vectors and a broadcast must fit the vector registers.
    max_rows = 12 if machine.registers == 32 else 6
    functions = [_tile_function(e, n, products) for n in range(1, max_rows + 1)]
    tile_size = I64(VECTORS * machine.lanes)
    stride = b.mul(tiles, tile_size)
    with e.loop(e.first, e.last) as tile:
        tile_weights = b.gep(w, [b.mul(b.mul(tile, inputs), tile_size)])
        tile_y = b.gep(y, [b.mul(tile, tile_size)])
        with e.loop(I64(0), rows, max_rows) as row:
            args = [b.gep(x, [b.mul(row, inputs)]), tile_weights, b.gep(tile_y, [b.mul(row, stride)]), inputs, stride]
            switch_block, done = b.block, b.append_basic_block()
            blocks = []
            for function in functions:
                blocks.append(b.append_basic_block())
                b.position_at_end(blocks[-1])
                b.call(function, args)
                b.branch(done)
            b.position_at_end(switch_block)
            switch = b.switch(b.sub(rows, row), blocks[-1])
            for n, block in enumerate(blocks[:-1], 1):
                switch.add_case(I64(n), block)
            b.position_at_end(done)
    b.ret_void()
    return e.module


def _round_to_bf16(e: Emitter, source: Value, target: Value, count: Value) -> None:
    """`count` fp32 numbers, a multiple of the vector width, to bf16 numbers packed two in a word."""
    half = ir.VectorType(BFloat(), e.lanes)
    function = e.function("llvm.x86.avx512bf16.cvtneps2bf16.512", half, [e.vector])
    with e.loop(I64(0), count, e.lanes) as i:
        rounded = e.b.call(function, [e.load(source, i)])
        words = e.b.bitcast(rounded, ir.VectorType(I32, e.lanes // 2))
        e.store(words, target, e.b.udiv(i, I64(2)))


def _tile_function(e: Emitter, rows: int, products: Products) -> ir.Function:
    """tile_<rows>(x, w, y, inputs, stride): one tile of outputs for `rows` rows, all sums held in registers.

    `inputs` counts steps of `products`.
    """
    pointers = [products.x_type.as_pointer(), products.weight_type.as_pointer(), F32.as_pointer()]
    function = ir.Function(e.module, ir.FunctionType(VOID, [*pointers, I64, I64]), f"tile_{rows}")
    function.linkage = "internal"
    x, w, y, inputs, stride = function.args
    lanes, outer = e.lanes, e.b
    words = ir.VectorType(I32, lanes)
    weight_bytes = 2 if products.weight_type is I16 else 4
    prefetch = e.function("llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
    e.b = b = ir.IRBuilder(function.append_basic_block())
    x_rows = [b.gep(x, [b.mul(I64(r), inputs)]) for r in range(rows)]

    def weight_at(here: Value) -> Value:
        vector = ir.VectorType(products.weight_type, lanes)
        loaded = b.load(b.bitcast(b.gep(w, [here]), vector.as_pointer()), align=weight_bytes)
        if products.weight_type is I16:
            return b.bitcast(b.shl(b.zext(loaded, words), ir.Constant(words, [16] * lanes)), e.vector)
        return loaded

    def add(x_value: Value, weight: Value, total: Value) -> Value:
        if products.step == 1:
            return e.fma(e.spread(x_value), weight, total)
        pairs = ir.VectorType(BFloat(), 2 * lanes)
        dot = e.function("llvm.x86.avx512bf16.dpbf16ps.512", e.vector, [e.vector, pairs, pairs])
        spread = e.spread(b.bitcast(x_value, F32))
        return b.call(dot, [total, b.bitcast(spread, pairs), b.bitcast(weight, pairs)])

    with e.sums(I64(0), inputs, [e.constant(0.0)] * (rows * VECTORS)) as (k, carried, results):
        start = b.mul(k, I64(VECTORS * lanes))
        weights = [weight_at(b.add(start, I64(v * lanes))) for v in range(VECTORS)]
        ahead = b.bitcast(b.gep(w, [b.add(start, I64(PREFETCH // weight_bytes))]), I8.as_pointer())
        b.call(prefetch, [ahead, I32(0), I32(3), I32(1)])
        for r in range(rows):
            x_value = b.load(b.gep(x_rows[r], [k]))
            for v in range(VECTORS):
                i = r * VECTORS + v
                carried[i] = add(x_value, weights[v], carried[i])
    for i, total in enumerate(results):
        r, v = divmod(i, VECTORS)
        e.store(total, y, b.add(b.mul(I64(r), stride), I64(v * lanes)))
    b.ret_void()
    e.b = outer
    return function


def rms_norm_kernel(machine: Machine, width: int, eps: float) -> ir.Module:
    """y = x / sqrt(mean(x^2) + eps) * weight. Fields: x [N, width], weight [width], y [N, width]; items: rows."""
    e = Emitter("fffi", machine, lanes_for(width, machine))
    b = e.b
    x, weight, y, _ = e.fields
    sqrt = e.function("llvm.sqrt.f32", F32, [F32])
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(width))
        with e.sums(I64(0), I64(width), [e.constant(0.0)], e.lanes) as (i, carried, results):
            value = e.load(x, b.add(start, i))
            carried[0] = e.fma(value, value, carried[0])
        mean = b.fdiv(e.total(results[0]), F32(float(width)))
        scale = e.spread(b.fdiv(F32(1.0), b.call(sqrt, [b.fadd(mean, F32(eps))])))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            here = b.add(start, i)
            e.store(b.fmul(b.fmul(e.load(x, here), scale), e.load(weight, i)), y, here)
    b.ret_void()
    return e.module


def rotary_kernel(machine: Machine, heads: int, head_dim: int) -> ir.Module:
    """Rotate the first `heads` heads of each row in place.

    Fields: x (row stride given), cos, sin [N, head_dim], row stride; items: rows.
    """
    half = head_dim // 2
    e = Emitter("fffii", machine, lanes_for(half, machine))
    b = e.b
    x, cos, sin, stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        angle = b.mul(row, I64(head_dim))
        with e.loop(I64(0), I64(heads)) as head:
            start = b.add(b.mul(row, stride), b.mul(head, I64(head_dim)))
            with e.loop(I64(0), I64(half), e.lanes) as i:
                places = [b.add(i, I64(0)), b.add(i, I64(half))]
                values = [e.load(x, b.add(start, p)) for p in places]
                for p, own, other in zip(places, values, reversed(values)):
                    at = b.add(angle, p)
                    rotated = e.fma(other, e.load(sin, at), b.fmul(own, e.load(cos, at)))
                    e.store(rotated, x, b.add(start, p))
    b.ret_void()
    return e.module


def silu_mul_kernel(machine: Machine, width: int) -> ir.Module:
    """y = silu(gate) * up. Fields: gate_up [N, 2*width], y [N, width]; items: rows."""
    e = Emitter("ffi", machine, lanes_for(width, machine))
    b = e.b
    gate_up, y, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(2 * width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            gate = e.load(gate_up, b.add(start, i))
            up = e.load(gate_up, b.add(start, b.add(i, I64(width))))
            denominator = b.fadd(e.constant(1.0), e.exp(b.fneg(gate)))
            e.store(b.fmul(b.fdiv(gate, denominator), up), y, b.add(b.mul(row, I64(width)), i))
    b.ret_void()
    return e.module


def attention_kernel(machine: Machine, kv_heads: int, group: int, head_dim: int) -> ir.Module:
    """Each query row over a contiguous run of cache slots, all queries of one KV head together.

    Fields: q (row stride given), kv [slots, 2, kv_heads, head_dim], out [N, kv_heads*group*head_dim], scores (scratch
    for `group` rows of `span` floats a KV head and row), first_slots [N], lengths [N], q row stride, span;
    items: rows * kv_heads.
    """
    e = Emitter("ffffqqiii", machine, lanes_for(head_dim, machine))
    b = e.b
    q, kv, out, scratch, first_slots, lengths, q_stride, span, _ = e.fields
    parts, slot_size = head_dim // e.lanes, 2 * kv_heads * head_dim
    lowest = F32(-1e30)
    with e.loop(e.first, e.last) as item:
        row, head = b.udiv(item, I64(kv_heads)), b.urem(item, I64(kv_heads))
        length = b.load(b.gep(lengths, [row]))
        first_slot = b.load(b.gep(first_slots, [row]))
        keys = b.gep(kv, [b.add(b.mul(first_slot, I64(slot_size)), b.mul(head, I64(head_dim)))])
        values = b.gep(keys, [I64(kv_heads * head_dim)])
        query = b.gep(q, [b.add(b.mul(row, q_stride), b.mul(head, I64(group * head_dim)))])
        scores = [b.gep(scratch, [b.mul(b.add(b.mul(item, I64(group)), I64(g)), span)]) for g in range(group)]
        scale = e.constant(head_dim**-0.5)
        queries = [b.fmul(e.load(query, I64(i * e.lanes)), scale) for i in range(group * parts)]
        with e.sums(I64(0), length, [lowest] * group) as (t, carried, highest):
            place = b.mul(t, I64(slot_size))
            key = [e.load(keys, b.add(place, I64(p * e.lanes))) for p in range(parts)]
            for g in range(group):
                products = b.fmul(queries[g * parts], key[0])
                for p in range(1, parts):
                    products = e.fma(queries[g * parts + p], key[p], products)
                score = e.total(products)
                b.store(score, b.gep(scores[g], [t]))
                carried[g] = e.maximum(carried[g], score)
        for g in range(group):  # whole vectors are read back: what lies past the end must weigh nothing
            e.store(e.constant(-1e30), scores[g], length)
        shifts = [e.spread(value) for value in highest]
        with e.sums(I64(0), length, [e.constant(0.0)] * group, e.lanes) as (t, carried, sums):
            for g in range(group):
                weight = e.exp(b.fsub(e.load(scores[g], t), shifts[g]))
                e.store(weight, scores[g], t)
                carried[g] = b.fadd(carried[g], weight)
        # exp of the padding is 1e-38, not 0: far below the last bit of a sum that is at least 1.
        totals = [e.total(value) for value in sums]
        with e.sums(I64(0), length, [e.constant(0.0)] * (group * parts)) as (t, carried, results):
            place = b.mul(t, I64(slot_size))
            value = [e.load(values, b.add(place, I64(p * e.lanes))) for p in range(parts)]
            for g in range(group):
                weight = e.spread(b.load(b.gep(scores[g], [t])))
                for p in range(parts):
                    i = g * parts + p
                    carried[i] = e.fma(weight, value[p], carried[i])
        result = b.gep(out, [b.mul(item, I64(group * head_dim))])
        for i, value in enumerate(results):
            inverse = e.spread(b.fdiv(F32(1.0), totals[i // parts]))
            e.store(b.fmul(value, inverse), result, I64(i * e.lanes))
    b.ret_void()
    return e.module
