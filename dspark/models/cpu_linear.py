"""LLVM code of the linear map: one kernel for each way this CPU can multiply (see `linear_kernel`)."""

from typing import Any

from llvmlite import ir

from dspark.models.cpu_emitter import BF16, F32, I8, I32, I64, VOID, Emitter, Machine, Value

VECTORS = 2  # vectors of outputs a tile of the linear map is wide
PREFETCH = 4096  # bytes ahead; hardware prefetching stops at pages. 13.8 GB/s without it, 19 with it, for one row
CACHE_LINE = 16  # words of 4 bytes
FEW_ROWS = 5  # whose weights are fetched to the first level; with more rows fetches that wait there hold up products


def linear_kernel(machine: Machine, kind: str) -> Emitter:
    """y = x W^T. Fields: x [N, K], w, y [N, tiles*tile], scratch, N, K; items: tiles. By `kind`:

    fp32      w [tiles, K, tile] fp32
    widened   w [tiles, K, tile/2, 2] bf16, outputs i and i + tile/2 of a tile in a word, widened in registers by one
              operation each: products and sums in fp32
    dots      w [tiles, K/2, tile, 2] bf16, K a multiple of 16; x rounded to bf16 (into `scratch`, [threads, N, K]
              bf16), products of pairs summed in fp32: several times the speed where rows are many
    Every output is one chain of additions over K in its order, whatever N is.
    """
    e = Emitter("ffffiii", machine, machine.lanes)
    b = e.b
    x, w, y, scratch, rows, inputs, tiles = e.fields
    if kind == "dots":
        rounded = scratch + e.thread * (rows * inputs) // 2
        _round_to_bf16(e, x, rounded, rows * inputs)
        x, inputs = rounded, inputs // 2
    # Accumulators of a tile, two weight vectors and a broadcast must fit the vector registers.
    max_rows = 12 if machine.registers == 32 else 6
    functions = [_tile_function(e, n, kind) for n in range(1, max_rows + 1)]
    tile_size = VECTORS * machine.lanes
    stride = tiles * tile_size
    tile_words = inputs * (_weight_vectors(kind) * machine.lanes)
    # Passes over a tile of about as many rows each: in a pass of few, reading and widening weights is most of the work.
    # If there is one, it fetches what it will soon read itself; several share the fetching of the next tile's weights,
    # so that memory keeps reading while all of them multiply.
    passes = (rows + (max_rows - 1)) // max_rows
    divisor = e.select(rows == 0, 1, passes)
    pass_rows = (rows + (divisor - 1)) // divisor
    share = tile_words // divisor
    first_ahead = e.select(passes < 2, PREFETCH // 4, tile_words)
    with e.items() as tile:
        weights, out = w + tile * tile_words, y + tile * tile_size
        with e.loop(0, passes) as i:
            row = i * pass_rows
            ahead = weights + (first_ahead + i * share)
            args = [x + row * inputs, weights, out + row * stride, inputs, stride, ahead, share // inputs]
            switch_block, done = b.block, b.append_basic_block()
            blocks = []
            for function in functions:
                blocks.append(b.append_basic_block())
                b.position_at_end(blocks[-1])
                b.call(function, [a.value for a in args])
                b.branch(done)
            b.position_at_end(switch_block)
            left = rows - row
            switch = b.switch(e.select(left < pass_rows, left, pass_rows).value, blocks[-1])
            for n, block in enumerate(blocks[:-1], 1):
                switch.add_case(I64(n), block)
            b.position_at_end(done)
    return e


def round_vector(e: Emitter, x: Value) -> Value:
    """16 fp32 numbers as 8 words of two bf16 numbers each."""
    rounded = e.call("x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BF16, 16), x)
    return rounded.bits(ir.VectorType(I32, 8))


def dot(e: Emitter, total: Value, x: Value, y: Value) -> Value:
    """total + the sum of two bf16 products in each of 16 words of x and y."""
    pairs = ir.VectorType(BF16, 2 * e.lanes)
    return e.call("x86.avx512bf16.dpbf16ps.512", total.type, total, x.bits(pairs), y.bits(pairs))


def _round_to_bf16(e: Emitter, source: Value, target: Value, count: Value) -> None:
    """`count` fp32 numbers, a multiple of the vector width, to bf16 numbers packed two in a word."""
    with e.loop(0, count, e.lanes) as i:
        target[i // 2] = round_vector(e, source.vector(i))


def _weight_vectors(kind: str) -> int:
    """That are read for a tile's outputs in each step, which is one input or, of "dots", a pair."""
    return 1 if kind == "widened" else VECTORS


def _tile_function(e: Emitter, rows: int, kind: str) -> ir.Function:
    """tile_<rows>(x, w, y, inputs, stride, ahead, words): one tile of outputs for `rows` rows, all sums in registers.

    `inputs` counts steps; each fetches the lines at `ahead`, which moves on by so many words.
    """
    pointer = F32.as_pointer()
    types = [pointer, pointer, pointer, I64, I64, pointer, I64]
    function = ir.Function(e.module, ir.FunctionType(VOID, types), f"tile_{rows}")
    function.linkage = "internal"
    x, w, y, inputs, stride, ahead, words = (Value(e, argument) for argument in function.args)
    locality = 3 if rows <= FEW_ROWS else 2
    lanes, vectors, outer = e.lanes, _weight_vectors(kind), e.b
    e.b = ir.IRBuilder(function.append_basic_block())
    x_rows = [x + inputs * r for r in range(rows)]

    with e.sums(0, inputs, [e.constant(0.0)] * (rows * VECTORS)) as (k, carried, results):
        weights = [w.vector(k * (vectors * lanes) + v * lanes) for v in range(vectors)]
        if kind == "widened":
            weights = e.widen(weights[0].bits(I32))
        for line in range(0, vectors * lanes, CACHE_LINE):
            e.prefetch(ahead + (k * words + line), locality)
        for r in range(rows):
            x_value = e.spread(x_rows[r][k])
            for v, weight in enumerate(weights):
                i = r * VECTORS + v
                if kind == "dots":
                    carried[i] = dot(e, carried[i], x_value, weight)
                else:
                    carried[i] = e.fma(x_value, weight, carried[i])
    for i, total in enumerate(results):
        r, v = divmod(i, VECTORS)
        y[stride * r + v * lanes] = total
    e.b.ret_void()
    e.b = outer
    return function


TILE_ROWS = 16  # of x, and of weights: pairs of inputs
TILE_INPUTS = 32


def tile_config(rows: int) -> bytes:
    """What LDTILECFG reads: palette 1, then bytes a row (16 bit) and rows (8 bit) of the eight tile registers."""
    tile_rows = [rows] * 6 + [TILE_ROWS] * 2
    return bytes([1]) + bytes(15) + bytes([64, 0] * 8) + bytes(16) + bytes(tile_rows) + bytes(8)


def tile_load(e: Emitter, register: int, place: Value, stride: Any) -> None:
    """Rows `stride` bytes apart."""
    e.call("x86.tileloadd64", VOID, I8(register), place.bits(I8.as_pointer()), stride)


def tile_store(e: Emitter, register: int, place: Value, stride: Any) -> None:
    e.call("x86.tilestored64", VOID, I8(register), place.bits(I8.as_pointer()), stride)


def tile_zero(e: Emitter, register: int) -> None:
    e.call("x86.tilezero", VOID, I8(register))


def tile_dot(e: Emitter, sums: int, x: int, y: int) -> None:
    """Add to the sums of one register the products of bf16 pairs of two others."""
    e.call("x86.tdpbf16ps", VOID, I8(sums), I8(x), I8(y))


def tiled_linear_kernel(machine: Machine) -> Emitter:
    """y = x W^T in AMX tiles, K a multiple of 32. Fields: x [N, K], w as for "dots", y with P rows, scratch [threads,
    P, K] bf16, tile_config(min(N, 16)), N, P, K; items: tiles. P is N up to 16 and a multiple of 16 above.

    x is rounded to bf16, products are summed in fp32. Rows past N hold whatever scratch held; a tile's rows are
    independent of each other, and each is summed over K in its order.
    """
    e = Emitter("fwfwwiiii", machine, machine.lanes)
    x, w, y, scratch, config, rows, padded, inputs, tiles = e.fields
    words = inputs // 2  # of a row in bf16
    own = scratch + e.thread * (padded * words)
    _round_to_bf16(e, x, own, rows * inputs)
    size = VECTORS * machine.lanes
    stride = tiles * size

    def multiply(row: Value, tile: Value, count: int, first: bool) -> None:
        """A tile of outputs for `count` times 16 rows: sums in registers 0..3, x in 4 and 5, weights in 6 and 7.

        The first rows fetch the next tile's weights, so that memory keeps reading while other rows use this one's.
        """
        sums = [(a, v, a * VECTORS + v) for a in range(count) for v in range(VECTORS)]
        for _, _, register in sums:
            tile_zero(e, register)
        x_tiles = [own + (row + a * TILE_ROWS) * words for a in range(count)]
        weights = w + tile * words * size
        with e.loop(0, words, TILE_INPUTS // 2) as k:
            for a in range(count):
                tile_load(e, 4 + a, x_tiles[a] + k, words * 4)
            for v in range(VECTORS):
                tile_load(e, 6 + v, weights + (k * size + v * machine.lanes), 4 * size)
            for line in range(0, TILE_INPUTS // 2 * size * first, CACHE_LINE):
                e.prefetch(weights + ((words + k) * size + line), locality=2)
            for a, v, register in sums:
                tile_dot(e, register, 4 + a, 6 + v)
        for a, v, register in sums:
            out = y + ((row + a * TILE_ROWS) * stride + tile * size)
            tile_store(e, register, out + v * machine.lanes, stride * 4)

    e.call("x86.ldtilecfg", VOID, config.bits(I8.as_pointer()))
    pair = 2 * TILE_ROWS
    few = padded < pair
    first_pair, few_rows = e.select(few, 0, pair), e.select(few, padded, 0)
    pairs = padded & -pair
    with e.items() as tile:
        with e.loop(0, few_rows, pair) as row:
            multiply(row, tile, 1, first=True)
        with e.loop(0, first_pair, pair) as row:
            multiply(row, tile, 2, first=True)
        with e.loop(first_pair, pairs, pair) as row:
            multiply(row, tile, 2, first=False)
        with e.loop(pairs + few_rows, padded, TILE_ROWS) as row:
            multiply(row, tile, 1, first=False)
    e.call("x86.tilerelease", VOID)
    return e
