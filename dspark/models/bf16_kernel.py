"""LLVM code of the product in `bf16_linear.py`: fp32 rows times bf16 weights, widened in registers.

Vector widths are arguments; LLVM does the rest for the CPU at hand. Shapes as there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

VECTORS = 2  # vectors of outputs a tile is wide
PREFETCH = 4096  # bytes ahead; hardware prefetching stops at pages. 13.8 GB/s without it, 19 with it, for one row

Value = Any  # llvmlite's builder methods carry no types
I8, I16, I32, I64, F32, VOID = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())


def worker_module(lanes: int, max_rows: int, thread_num: int, num_threads: int) -> ir.Module:
    """LLVM module with `worker(_Call*)`: this thread's share of the tiles, each for all rows."""
    module = ir.Module("bf16_linear")
    module.triple = llvm.get_default_triple()
    call_type = ir.LiteralStructType([F32.as_pointer(), I16.as_pointer(), F32.as_pointer(), I64, I64, I64])
    worker = ir.Function(module, ir.FunctionType(VOID, [call_type.as_pointer()]), "worker")
    b = ir.IRBuilder(worker.append_basic_block())
    x, w, y, rows, inputs, tiles = (
        b.load(b.gep(worker.args[0], [I32(0), I32(i)])) for i in range(len(call_type.elements))
    )

    def call_address(address: int) -> Value:
        function = b.inttoptr(I64(address), ir.FunctionType(I32, []).as_pointer())
        return b.zext(b.call(function, []), I64)

    thread, threads = call_address(thread_num), call_address(num_threads)
    first, last = (b.udiv(b.mul(tiles, t), threads) for t in (thread, b.add(thread, I64(1))))
    tile_functions = [_tile_function(module, lanes, n) for n in range(1, max_rows + 1)]
    tile_size = I64(VECTORS * lanes)
    stride = b.mul(tiles, tile_size)

    with _for(b, first, last, I64(1)) as tile:
        tile_weights = b.gep(w, [b.mul(b.mul(tile, inputs), tile_size)])
        tile_y = b.gep(y, [b.mul(tile, tile_size)])
        with _for(b, I64(0), rows, I64(max_rows)) as row:
            args = [b.gep(x, [b.mul(row, inputs)]), tile_weights, b.gep(tile_y, [b.mul(row, stride)]), inputs, stride]
            left = b.sub(rows, row)
            done = b.append_basic_block()
            switch = b.switch(left, b.append_basic_block("full"))
            for n, function in enumerate(tile_functions, 1):
                block = switch.default if n == max_rows else b.append_basic_block(f"rows{n}")
                if n < max_rows:
                    switch.add_case(I64(n), block)
                b.position_at_end(block)
                b.call(function, args)
                b.branch(done)
            b.position_at_end(done)
    b.ret_void()
    return module


def _tile_function(module: ir.Module, lanes: int, rows: int) -> ir.Function:
    """tile_<rows>(x, w, y, inputs, stride): one tile of outputs for `rows` rows, all sums held in registers."""
    vector, halves, words = (ir.VectorType(t, lanes) for t in (F32, I16, I32))
    name = f"llvm.fma.v{lanes}f32"
    fma = module.globals.get(name) or ir.Function(module, ir.FunctionType(vector, [vector] * 3), name)
    name = "llvm.prefetch.p0"
    signature = ir.FunctionType(VOID, [I8.as_pointer(), I32, I32, I32])
    prefetch = module.globals.get(name) or ir.Function(module, signature, name)
    pointers = [F32.as_pointer(), I16.as_pointer(), F32.as_pointer()]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, I64, I64]), f"tile_{rows}")
    function.linkage = "internal"
    x, w, y, inputs, stride = function.args
    entry, loop, end = (function.append_basic_block(n) for n in ("entry", "loop", "end"))
    b = ir.IRBuilder(entry)
    x_rows = [b.gep(x, [b.mul(I64(r), inputs)]) for r in range(rows)]
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(I64)
    k.add_incoming(I64(0), entry)
    sums = [[b.phi(vector) for _ in range(VECTORS)] for _ in range(rows)]
    weights = []
    for v in range(VECTORS):
        start = b.add(b.mul(k, I64(VECTORS * lanes)), I64(v * lanes))
        load = b.load(b.bitcast(b.gep(w, [start]), halves.as_pointer()), align=2)
        bits = b.shl(b.zext(load, words), ir.Constant(words, [16] * lanes))
        weights.append(b.bitcast(bits, vector))
    ahead = b.bitcast(b.gep(w, [b.add(b.mul(k, I64(VECTORS * lanes)), I64(PREFETCH // 2))]), I8.as_pointer())
    b.call(prefetch, [ahead, I32(0), I32(3), I32(1)])
    new_sums = []
    for r in range(rows):
        scalar = b.load(b.gep(x_rows[r], [k]))
        first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        spread = b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
        new_sums.append([b.call(fma, [spread, weights[v], sums[r][v]]) for v in range(VECTORS)])
    following = b.add(k, I64(1))
    b.cbranch(b.icmp_unsigned("<", following, inputs), loop, end)
    k.add_incoming(following, loop)
    for r in range(rows):
        for v in range(VECTORS):
            sums[r][v].add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
            sums[r][v].add_incoming(new_sums[r][v], loop)
    b.position_at_end(end)
    for r in range(rows):
        for v in range(VECTORS):
            place = b.gep(y, [b.add(b.mul(I64(r), stride), I64(v * lanes))])
            b.store(new_sums[r][v], b.bitcast(place, vector.as_pointer()), align=4)
    b.ret_void()
    return function


@contextmanager
def _for(b: ir.IRBuilder, start: Value, stop: Value, step: Value) -> Iterator[Value]:
    """`with _for(builder, start, stop, step) as i`: a counting loop around what the body emits."""
    before = b.block
    head, body, end = (b.append_basic_block(n) for n in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    b.cbranch(b.icmp_unsigned("<", i, stop), body, end)
    b.position_at_end(body)
    yield i
    i.add_incoming(b.add(i, step), b.block)
    b.branch(head)
    b.position_at_end(end)
