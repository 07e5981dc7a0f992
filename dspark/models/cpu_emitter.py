"""Emitting LLVM code for the compiled CPU operations in `cpu_ops.py`.

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

Value = Any  # llvmlite's builder methods carry no types
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32, F64, VOID = ir.FloatType(), ir.DoubleType(), ir.VoidType()
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
    """What code is generated for: fp32 lanes of a vector register, their number, and OpenMP's addresses."""

    lanes: int
    registers: int
    bf16_dots: bool  # AVX512-BF16: sums of two bf16 products a lane in one instruction
    bf16_tiles: bool  # AMX: products of 16 rows by 32 inputs by 16 outputs in one instruction
    thread_num: int
    num_threads: int
    barrier: int


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
        self.b.store(value, self.b.bitcast(self.b.gep(pointer, [index]), value.type.as_pointer()), align=2)

    def prefetch(self, pointer: Value, index: Value, locality: int) -> None:
        """Ask for the cache line at pointer[index]; locality 3 brings it nearest, 0 leaves soonest."""
        place = self.b.bitcast(self.b.gep(pointer, [index]), I8.as_pointer())
        function = self.function("llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
        self.b.call(function, [place, I32(0), I32(locality), I32(1)])

    def load_bf16(self, pointer: Value, index: Value) -> Value:
        """bf16 numbers in memory, widened."""
        b, words = self.b, ir.VectorType(I32, self.lanes)
        halves = ir.VectorType(I16, self.lanes)
        loaded = b.load(b.bitcast(b.gep(pointer, [index]), halves.as_pointer()), align=2)
        return b.bitcast(b.shl(b.zext(loaded, words), ir.Constant(words, [16] * self.lanes)), self.vector)

    def widen(self, pairs: Value) -> list[Value]:
        """Words of two bf16 numbers each: the lower ones, and the upper ones."""
        b, words = self.b, pairs.type
        low = b.shl(pairs, ir.Constant(words, [16] * self.lanes))
        high = b.and_(pairs, ir.Constant(words, [0xFFFF0000] * self.lanes))
        return [b.bitcast(half, self.vector) for half in (low, high)]

    def to_bf16(self, value: Value) -> Value:
        """Rounded to the nearest bf16, ties to even; NaN stays NaN."""
        b, words = self.b, ir.VectorType(I32, self.lanes)

        def constant(word: int) -> Value:
            return ir.Constant(words, [word] * self.lanes)

        bits = b.bitcast(value, words)
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        rounded = b.add(bits, b.add(odd, constant(0x7FFF)))
        rounded = b.select(b.fcmp_unordered("uno", value, value), constant(0x7FC00000), rounded)
        return b.trunc(b.lshr(rounded, constant(16)), ir.VectorType(I16, self.lanes))

    def spread(self, scalar: Value) -> Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
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

    def highest(self, value: Value) -> Value:
        name = f"llvm.vector.reduce.fmax.v{self.lanes}f32"
        return self.b.call(self.function(name, F32, [self.vector]), [value])

    def any_from(self, value: Value, bound: Value) -> Value:
        """Whether any lane is not below the bound."""
        reached = self.b.fcmp_ordered(">=", value, self.spread(bound))
        name = f"llvm.vector.reduce.or.v{self.lanes}i1"
        return self.b.call(self.function(name, ir.IntType(1), [reached.type]), [reached])

    def transposed(self, rows: list[Value]) -> list[Value]:
        """A square of `lanes` vectors, turned: log2(lanes) times its upper half is dealt alternately with its lower."""
        half = self.lanes // 2
        pairs = [i // 2 + self.lanes * (i % 2) for i in range(2 * self.lanes)]  # a0 b0 a1 b1 ...
        low, high = (
            ir.Constant(ir.VectorType(I32, self.lanes), part) for part in (pairs[: self.lanes], pairs[self.lanes :])
        )
        for _ in range(self.lanes.bit_length() - 1):
            zipped = [
                self.b.shuffle_vector(a, c, order) for a, c in zip(rows[:half], rows[half:]) for order in (low, high)
            ]
            rows = zipped
        return rows

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

    def log(self, x: Value) -> Value:
        """Natural logarithm of a scalar above 0: n ln 2 and, of the rest m next to 1, 2 artanh((m - 1) / (m + 1))."""
        b = self.b
        bits = b.sub(b.bitcast(x, I32), I32(0x3F3504F3))  # of the square root of 1/2
        n = b.ashr(bits, I32(23))
        rest = b.bitcast(b.add(b.and_(bits, I32(0x7FFFFF)), I32(0x3F3504F3)), F32)
        s = b.fdiv(b.fsub(rest, F32(1.0)), b.fadd(rest, F32(1.0)))
        square, series = b.fmul(s, s), F32(2 / 9)
        for degree in (7, 5, 3, 1):
            series = b.fadd(b.fmul(series, square), F32(2 / degree))
        return b.fadd(b.fmul(b.sitofp(n, F32), F32(math.log(2))), b.fmul(series, s))


def lanes_for(width: int, machine: Machine) -> int:
    """The widest vector that divides `width`."""
    return math.gcd(width, machine.lanes)
