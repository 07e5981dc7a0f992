"""Writing LLVM code for the compiled CPU operations in `cpu_ops.py` with Python's operators.

Every kernel is `void kernel(Call*)`: a struct of pointers and sizes whose last field is the number of independent
items. Each OpenMP thread that enters it works on its share of them. An item's arithmetic never depends on other items.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
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


BF16 = BFloat()


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


def operator(of_ints: str, of_floats: str = "", *sign: str) -> Callable[[Any, Any], "Value"]:
    """Of two operands, by names of methods of llvmlite's builder."""

    def apply(a: "Value", b: Any) -> "Value":
        operands = (x.value for x in a.e.alike(a, b))
        return Value(a.e, getattr(a.e.b, of_floats if a.is_float else of_ints)(*sign, *operands))

    return apply


class Value:
    """What the code computes, a number, a vector or a pointer: each operator writes the instruction that does it.

    A Python number beside it is a constant of its type, a number beside a vector stands in all lanes. Comparisons with
    NaN are false. Whole numbers are signed, but what is divided, or converted to more bits, is not below 0.
    Of a pointer, p[i] reads the number there, p[i] = x writes a number or a vector, p + i points there.
    """

    def __init__(self, e: "Emitter", value: Any):
        self.e, self.value, self.type = e, value, value.type
        self.element = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        self.is_float = self.element in (F32, F64)

    @property
    def suffix(self) -> str:
        """What LLVM's functions for its type end in."""
        return (f"v{self.type.count}" if isinstance(self.type, ir.VectorType) else "") + self.element.intrinsic_name

    _add = operator("add", "fadd")
    __sub__ = operator("sub", "fsub")
    __mul__ = __rmul__ = operator("mul", "fmul")
    __truediv__ = operator("", "fdiv")
    __floordiv__, __mod__ = operator("udiv"), operator("urem")
    __lshift__, __rshift__ = operator("shl"), operator("ashr")
    __and__, __or__ = operator("and_"), operator("or_")
    __lt__, __le__, __gt__, __ge__ = (operator("icmp_signed", "fcmp_ordered", sign) for sign in ("<", "<=", ">", ">="))
    __eq__: Any = operator("icmp_signed", "fcmp_ordered", "==")

    def __add__(self, other: Any) -> "Value":
        if isinstance(self.type, ir.PointerType):
            return Value(self.e, self.e.b.gep(self.value, [self.e.number(other).value]))
        return self._add(other)

    __radd__ = __add__

    def __rsub__(self, other: Any) -> "Value":
        return self.e.number(other, self.type) - self

    def __rtruediv__(self, other: Any) -> "Value":
        return self.e.number(other, self.type) / self

    def __neg__(self) -> "Value":
        return Value(self.e, self.e.b.fneg(self.value))

    def __invert__(self) -> "Value":
        return Value(self.e, self.e.b.not_(self.value))

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.e, self.e.b.load((self + index).value))

    def __setitem__(self, index: Any, x: Any) -> None:
        x = self.e.number(x, self.type.pointee)
        if isinstance(x.type, ir.VectorType):
            self.e.b.store(x.value, (self + index).bits(x.type.as_pointer()).value, align=2)
        else:
            self.e.b.store(x.value, (self + index).value)

    def vector(self, index: Any = 0) -> "Value":
        """All lanes from p[i] on; bf16 numbers are widened to fp32."""
        in_bf16 = self.type.pointee == I16
        place = (self + index).bits(ir.VectorType(self.type.pointee, self.e.lanes).as_pointer())
        loaded = Value(self.e, self.e.b.load(place.value, align=2 if in_bf16 else 4))
        return (loaded.to(I32) << 16).bits(F32) if in_bf16 else loaded

    def _shaped(self, kind: ir.Type) -> ir.Type:
        return ir.VectorType(kind, self.type.count) if isinstance(self.type, ir.VectorType) else kind

    def to(self, kind: Any) -> "Value":
        """The same number in another type."""
        if kind in (F32, F64):
            name = "sitofp" if not self.is_float else "fpext" if kind == F64 else "fptrunc"
        else:
            name = "fptosi" if self.is_float else "zext" if kind.width > self.element.width else "trunc"
        return Value(self.e, getattr(self.e.b, name)(self.value, self._shaped(kind)))

    def bits(self, kind: ir.Type) -> "Value":
        """The same bits as numbers of another type, or as another vector or pointer."""
        whole = isinstance(kind, ir.VectorType | ir.PointerType)
        return Value(self.e, self.e.b.bitcast(self.value, kind if whole else self._shaped(kind)))


class Emitter:
    """What writes `void kernel(Call*)`: the loaded `fields`, and `first`..`last`, this thread's items."""

    def __init__(self, fields: str, machine: Machine, lanes: int):
        """fields: one letter each (see FIELD_TYPES), the last one the number of items; lanes: width of a vector."""
        self.lanes = lanes
        self.module = ir.Module("kernel")
        self.module.triple = llvm.get_default_triple()
        call = ir.LiteralStructType([FIELD_TYPES[f] for f in fields])
        function = ir.Function(self.module, ir.FunctionType(VOID, [call.as_pointer()]), "kernel")
        self.b = b = ir.IRBuilder(function.append_basic_block())
        self.fields = [Value(self, b.load(b.gep(function.args[0], [I32(0), I32(i)]))) for i in range(len(fields))]
        self.thread = self.call(machine.thread_num, I32).to(I64)
        threads = self.call(machine.num_threads, I32).to(I64)
        self.first, self.last = (self.fields[-1] * t // threads for t in (self.thread, self.thread + 1))

    def finished(self) -> str:
        """The code, to which no more is added."""
        self.b.ret_void()
        return str(self.module)

    def number(self, x: Any, kind: Any = None) -> Value:
        """A Python number as a constant of that type, else of 64 bits or fp32; what is a value already as it is."""
        if isinstance(x, Value):
            return x
        if isinstance(x, ir.Value):
            return Value(self, x)
        kind = kind or (F32 if isinstance(x, float) else I64)
        return Value(self, ir.Constant(kind, [x] * kind.count if isinstance(kind, ir.VectorType) else x))

    def alike(self, *operands: Any) -> list[Value]:
        """All of one type: that of a vector among them, else of the first that is no Python number."""
        types = [x.type for x in operands if isinstance(x, Value | ir.Value)]  # pyright: ignore
        kind = next((t for t in types if isinstance(t, ir.VectorType)), types[0] if types else None)
        values = [self.number(x, kind) for x in operands]
        return [self.spread(x) for x in values] if isinstance(kind, ir.VectorType) else values

    def call(self, function: Any, result: ir.Type, *arguments: Any, fastmath: tuple[str, ...] = ()) -> Value:
        """One of LLVM's own functions by its name, or what lies at an address."""
        values = [self.number(a).value for a in arguments]
        kind = ir.FunctionType(result, [v.type for v in values])
        if isinstance(function, str):
            callee = self.module.globals.get(f"llvm.{function}") or ir.Function(self.module, kind, f"llvm.{function}")
        else:
            callee = self.b.inttoptr(self.number(function).value, kind.as_pointer())
        return Value(self, self.b.call(callee, values, fastmath=fastmath))

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Value]:
        """`with e.loop(a, b) as i`: a counting loop around what the body emits."""
        with self.sums(start, stop, [], step) as (i, _, _):
            yield i

    def items(self) -> AbstractContextManager[Value]:
        """The loop over this thread's items."""
        return self.loop(self.first, self.last)

    @contextmanager
    def sums(self, start: Any, stop: Any, initial: list, step: int = 1) -> Iterator[tuple[Value, list, list[Value]]]:
        """A loop that carries values: yields (i, carried, results).

        The body replaces the contents of `carried`; after the loop `results` holds the final ones.
        """
        b, before = self.b, self.b.block
        begin = [self.number(x).value for x in (start, *initial)]
        head, body, end = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        phis = [b.phi(x.type) for x in begin]
        for phi, x in zip(phis, begin, strict=True):
            phi.add_incoming(x, before)
        i, *results = (Value(self, phi) for phi in phis)
        b.cbranch((i < stop).value, body, end)
        b.position_at_end(body)
        carried = list(results)
        yield i, carried, results
        for phi, x in zip(phis, [i + step, *carried], strict=True):
            phi.add_incoming(self.number(x, phi.type).value, b.block)
        b.branch(head)
        b.position_at_end(end)

    def select(self, condition: Value, a: Any, b: Any) -> Value:
        """a where it is true, else b."""
        return Value(self, self.b.select(condition.value, *(x.value for x in self.alike(a, b))))

    def maximum(self, a: Any, b: Any) -> Value:
        """b where one of them is no number."""
        return self.select(self.number(a) > b, a, b)

    def minimum(self, a: Any, b: Any) -> Value:
        return self.select(self.number(a) < b, a, b)

    def prefetch(self, place: Value, locality: int) -> None:
        """Ask for the cache line there; locality 3 brings it nearest, 0 leaves soonest."""
        self.call("prefetch.p0", VOID, place.bits(I8.as_pointer()), I32(0), I32(locality), I32(1))

    # -- vectors ------------------------------------------------------------------------------------

    def constant(self, x: float, kind: ir.Type = F32) -> Value:
        """That number in all lanes."""
        return self.number(x, ir.VectorType(kind, self.lanes))

    def lane_numbers(self, kind: ir.Type) -> Value:
        return Value(self, ir.Constant(ir.VectorType(kind, self.lanes), list(range(self.lanes))))

    def spread(self, x: Value) -> Value:
        """The number in all lanes."""
        if isinstance(x.type, ir.VectorType):
            return x
        undefined = ir.Constant(ir.VectorType(x.type, self.lanes), ir.Undefined)
        first = Value(self, self.b.insert_element(undefined, x.value, I32(0)))
        return self.shuffled(first, Value(self, undefined), [0] * self.lanes)

    def shuffled(self, a: Value, b: Value, order: list[int]) -> Value:
        """Elements of two vectors, one after the other, in that order."""
        mask = ir.Constant(ir.VectorType(I32, len(order)), order)
        return Value(self, self.b.shuffle_vector(a.value, b.value, mask))

    def elementwise(self, name: str, *operands: Any) -> Value:
        """One of LLVM's functions of floats, or of vectors of them: fma, rint, sqrt."""
        values = self.alike(*operands)
        return self.call(f"{name}.{values[0].suffix}", values[0].type, *values)

    def fma(self, a: Any, x: Any, c: Any) -> Value:
        return self.elementwise("fma", a, x, c)

    def reduce(self, name: str, x: Value) -> Value:
        """One number of a vector's: add, or, umin, fmax."""
        return self.call(f"vector.reduce.{name}.{x.suffix}", x.element, x)

    def total(self, x: Value) -> Value:
        """The sum of a vector of floats, added in any order."""
        return self.call(f"vector.reduce.fadd.{x.suffix}", x.element, x.element(0.0), x, fastmath=("reassoc",))

    def widen(self, pairs: Value) -> list[Value]:
        """Words of two bf16 numbers each: the lower ones, and the upper ones."""
        return [half.bits(F32) for half in (pairs << 16, pairs & -65536)]

    def to_bf16(self, value: Value) -> Value:
        """Rounded to the nearest bf16, ties to even; NaN stays NaN."""
        bits = value.bits(I32)
        rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
        return (self.select(value == value, rounded, 0x7FC00000) >> 16).to(I16)

    def transposed(self, rows: list[Value]) -> list[Value]:
        """A square of `lanes` vectors, turned: log2(lanes) times its upper half is dealt alternately with its lower."""
        half = self.lanes // 2
        pairs = [i // 2 + self.lanes * (i % 2) for i in range(2 * self.lanes)]  # a0 b0 a1 b1 ...
        orders = pairs[: self.lanes], pairs[self.lanes :]
        for _ in range(self.lanes.bit_length() - 1):
            halves = zip(rows[:half], rows[half:], strict=True)
            rows = [self.shuffled(a, b, order) for a, b in halves for order in orders]
        return rows

    def exp(self, x: Value) -> Value:
        """e**x to 2 units in the last place for x in -87..88 (clamped): 2**n times a polynomial of the rest."""
        x = self.minimum(self.maximum(x, -87.0), 88.0)
        n = self.elementwise("rint", x * math.log2(math.e))
        rest = self.fma(n, -0.693359375, x)  # ln 2 in two parts, the first exact in few bits
        rest = self.fma(n, 2.12194440e-4, rest)
        result = self.constant(1 / math.factorial(7))
        for degree in range(6, -1, -1):
            result = self.fma(result, rest, 1 / math.factorial(degree))
        return (result.bits(I32) + (n.to(I32) << 23)).bits(F32)

    def log(self, x: Value) -> Value:
        """Natural logarithm of a scalar above 0: n ln 2 and, of the rest m next to 1, 2 artanh((m - 1) / (m + 1))."""
        root = 0x3F3504F3  # the bits of the square root of 1/2
        bits = x.bits(I32) - root
        rest = ((bits & 0x7FFFFF) + root).bits(F32)
        s = (rest - 1.0) / (rest + 1.0)
        square, series = s * s, 2 / 9
        for degree in (7, 5, 3, 1):
            series = series * square + 2 / degree
        return (bits >> 23).to(F32) * math.log(2) + series * s


def lanes_for(width: int, machine: Machine) -> int:
    """The widest vector that divides `width`."""
    return math.gcd(width, machine.lanes)
